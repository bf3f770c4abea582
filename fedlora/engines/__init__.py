"""Where clients run: in this process, on Ray, on other machines; and the runtime that answers for them."""
