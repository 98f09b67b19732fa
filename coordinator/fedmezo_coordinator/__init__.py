"""The coordinator daemon: journal store, gRPC service, replica process, command lines. Serves without torch."""
