"""The generation engine and what is built on it: asking, chatting, and answering files of questions."""

from llavar_peft.compat.released_names import moved_names

__getattr__ = moved_names(
    __name__,
    {
        "Answer": "inference.generation_request",
        "Chat": "inference.chat",
        "Dialogue": "inference.chat",
        "Picture": "inference.generation_request:PromptImage",
        "Request": "inference.generation_request",
        "Sampling": "inference.token_sampling",
        "load_chat": "inference.chat",
    },
)
