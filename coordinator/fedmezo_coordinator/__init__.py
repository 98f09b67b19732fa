"""The coordinator and the relay: gRPC service, stores, replica, commands; serves without torch."""
