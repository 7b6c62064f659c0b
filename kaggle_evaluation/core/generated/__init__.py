"""Messages and stubs of the wire contract, as protoc would name them."""
