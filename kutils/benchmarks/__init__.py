"""Speed and memory compared with the published pipeline and plain implementations; nothing imports this room."""
