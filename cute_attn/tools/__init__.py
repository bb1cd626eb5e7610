"""What looks at kernels and times them: bench, tune, inspect, audit, validate. Nothing else imports it."""
