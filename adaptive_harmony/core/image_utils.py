"""Images in threads."""

from harmony_core.text.image_utils import (
    image_to_base64 as image_to_base64,
    pil_to_base64 as pil_to_base64,
    save_inlined_string_to_png as save_inlined_string_to_png,
    save_string_thread_to_markdown_dir as save_string_thread_to_markdown_dir,
    string_thread_to_html_string as string_thread_to_html_string,
)
