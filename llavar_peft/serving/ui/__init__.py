"""The Gradio page for asking a served model."""
