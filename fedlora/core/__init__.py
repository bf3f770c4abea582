"""Values, arithmetic and interfaces: adapters, their algebra, messages, the strategy. No I/O."""
