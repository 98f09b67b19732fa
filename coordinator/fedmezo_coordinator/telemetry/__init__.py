"""What other tools read: event files for TensorBoard, traces for OpenTelemetry."""
