"""Chats: rows of the known styles to messages, messages to a text, and what of it the assistant says."""
