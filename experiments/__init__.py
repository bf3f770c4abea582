"""What we run: the `fedlora` command, its configuration, benchmarks and recorded results."""
