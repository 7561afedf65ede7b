"""The client library, part by part."""
