"""Speed and memory beside the published pipeline and the plain way; nothing imports this room."""
