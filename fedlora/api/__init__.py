"""The Python interface: simulate, Session, open, sweep; `import fedlora` offers what is here."""
