"""What a reader of our results runs: settings of studies, benchmarks, studies and what they found."""
