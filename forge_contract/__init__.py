"""What broker, worker and client agree on: messages, framing, payloads, errors, configuration, routers."""
