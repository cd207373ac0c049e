"""The generation engine and what is built on it: asking, chatting, and answering files of questions."""
