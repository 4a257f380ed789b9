"""From a conversation to tokens: threads, chat templates, tokenizers, what is trained."""
