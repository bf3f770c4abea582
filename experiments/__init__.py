"""What a reader of the papers runs: settings of experiments, benchmarks, and studies with their results."""
