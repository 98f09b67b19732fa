"""The wire contract `fedmezo.v1`: .proto files and the code generated from them."""
