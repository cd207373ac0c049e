"""The page's colours, fonts and layout, and its JavaScript. All fonts are those of the user's machine."""

from __future__ import annotations

from typing import Any, Final

import gradio as gr

_SANS: Final = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif")
_MONO: Final = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def make_theme() -> Any:
    """Return the theme; it downloads no fonts."""
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_md,
        font=_SANS,
        font_mono=_MONO,
    )
    return theme.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
    )


STYLE: Final = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important;
  padding: 8px 16px !important; }
#head h1 { margin: 0; font-size: 1.35rem; }
#head p { margin: 2px 0 0; opacity: .75; }
#answers { gap: 12px; flex-wrap: wrap; }
#answers > * { flex: 1 1 260px; min-width: min(260px, 100%) !important; }
#keep { justify-content: flex-end; gap: 8px; }
#keep button { flex: 0 0 auto; min-width: 0; }
#window_0, #window_1 { height: 442px; overflow-y: auto !important; padding: 12px !important; box-sizing: border-box;
  background: var(--block-background-fill); border: 1px solid var(--block-border-color) !important;
  border-radius: var(--block-radius) !important; }
.window h2 { margin: 0 0 10px; font-size: .85rem; font-weight: 600; color: var(--block-label-text-color);
  overflow-wrap: anywhere; }
.window .empty { opacity: .6; }
.window .said { margin: 0 0 10px; padding: 8px 12px; border-radius: var(--radius-lg); white-space: pre-wrap;
  overflow-wrap: anywhere; line-height: 1.45; }
.window .question { margin-left: 12%; background: color-mix(in srgb, var(--primary-500) 16%, transparent); }
.window .answer { margin-right: 4%; background: color-mix(in srgb, var(--neutral-500) 12%, transparent); }
.window .copy { display: block; margin: 4px 0 0 -4px; padding: 0 4px; font-size: .75rem; cursor: pointer;
  opacity: .7; border: 0; background: transparent; color: inherit; text-decoration: underline; }
.window .copy:hover, .window .copy:focus-visible { opacity: 1; }
.window .waiting .words::after { content: "\\2026"; opacity: .6; }
@media (max-width: 640px) {
  .gradio-container { padding: 0 !important; }
  .gradio-container .main { padding: 10px !important; }
  #window_0, #window_1 { height: auto; min-height: 110px; max-height: 70vh; }
}
"""

COPY: Final = """
element.addEventListener("click", (event) => {
  const button = event.target.closest(".copy");
  if (!button) return;
  const words = button.closest(".said").querySelector(".words");
  const done = () => { button.textContent = "Copied"; };
  const copy_selection = () => {
    getSelection().selectAllChildren(words);
    document.execCommand("copy");
    getSelection().removeAllRanges();
    done();
  };
  // Browsers offer a clipboard only to pages of the same machine or behind TLS.
  if (navigator.clipboard) navigator.clipboard.writeText(words.textContent).then(done, copy_selection);
  else copy_selection();
});
const box = element.closest("#window_0, #window_1");
watch("value", () => { box.scrollTop = box.scrollHeight; });
"""
"""JavaScript of a window: copies an answer, and scrolls to the end of the last one."""

SAVE: Final = """(text, name) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/plain;charset=utf-8"}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
"""JavaScript that saves a text as a file in the browser."""

WATCH_DROPS: Final = """() => {
  document.addEventListener("drop", (event) => {
    const images = [...event.dataTransfer.files].filter((file) => file.type.startsWith("image/"));
    if (images.length > 1 && event.target.closest("#image")) document.querySelector("#several").click();
  }, true);
}"""
"""JavaScript that tells the page that several images were dropped at once; Gradio keeps the first silently."""
