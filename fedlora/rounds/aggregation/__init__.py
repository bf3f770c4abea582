"""How a round's replies become the next state, by what the server is allowed to see of them."""
