"""The page of `fastrecycle serve`: Gradio around `Service`, and nothing more."""

from __future__ import annotations

import importlib.util
import ipaddress
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from fastrecycle.serve.service import Answer, Example, Service


def check_gradio() -> None:
    """Raise where Gradio is absent.

    Raises:
        ImportError: it is not installed.

    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError(
            'serve: gradio is not installed; pip install "fastrecycle[serve]", or use'
            " FewShotClassifier in Python"
        )


def make_page(service: Service) -> Any:
    """A gradio.Blocks; a visitor's examples live in their browser session alone.

    Raises:
        ImportError: Gradio is not installed.

    """
    check_gradio()
    import gradio as gr

    limits = service.limits

    def add(
        examples: tuple[Example, ...], label: str, files: list[str] | None
    ) -> tuple[tuple[Example, ...], list[tuple[Any, str]], str, None]:
        examples = _told(gr.Error, service.add, examples, label or "", files or [])
        return examples, _gallery(examples), summary(examples), None

    def clear() -> tuple[tuple[Example, ...], list[Any], str]:
        return (), [], summary(())

    def classify(
        examples: tuple[Example, ...], files: list[str] | None
    ) -> tuple[list[tuple[Any, str]], list[list[str]], str]:
        answer = _told(gr.Error, service.classify, examples, files or [])
        return answered(answer, files or [])

    # no fonts from elsewhere, no statistics to anyone, uploads gone after an hour
    with gr.Blocks(title="fastrecycle", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        examples = gr.State(())
        gr.Markdown(
            "# Few-shot classification in one forward pass\n"
            "Give a class a name and some pictures, do the same for another, and hand in pictures"
            f" to classify. Nothing is trained. At most {limits.pictures} pictures at a time of"
            f" {limits.file_bytes / 1e6:g} MB each."
        )
        with gr.Row():
            with gr.Column():
                label = gr.Textbox(label="Class name", max_length=limits.name)
                shown = gr.File(label="Its pictures", file_count="multiple", file_types=["image"])
                with gr.Row():
                    adding = gr.Button("Add examples", variant="primary")
                    clearing = gr.Button("Clear examples")
                known = gr.Markdown(summary(()))
                gallery = gr.Gallery(label="Examples", columns=5, height="auto")
            with gr.Column():
                asked = gr.File(
                    label="Pictures to classify", file_count="multiple", file_types=["image"]
                )
                classifying = gr.Button("Classify", variant="primary")
                timing = gr.Markdown()
                found = gr.Gallery(label="Answers", columns=4, height="auto")
                table = gr.Dataframe(
                    headers=["picture", "class", "probability"], label="Answers as a table",
                    interactive=False,
                )  # fmt: skip
        adding.click(
            add, [examples, label, shown], [examples, gallery, known, shown], api_name="add"
        )
        clearing.click(clear, [], [examples, gallery, known], api_name="clear")
        classifying.click(
            classify, [examples, asked], [found, table, timing], api_name="classify",
            concurrency_limit=1,
        )  # fmt: skip
    return page


def open_page(
    service: Service,
    host: str = "127.0.0.1",
    port: int = 7860,
    *,
    say: Callable[[str], None] = print,
    block: bool = True,
) -> Any:
    """Serve the page until Ctrl-C.

    Args:
        service: see `Service`.
        host: address to listen on; others than this machine's own are named to `say`.
        port: to listen on.
        say: takes lines of output.
        block: False: return at once, the page goes on in a thread.

    Returns:
        The gradio.Blocks; `close()` ends it.

    Raises:
        ImportError: Gradio is not installed.
        OSError: the port is taken.

    """
    page = make_page(service)
    import gradio as gr

    if not _is_local(host):
        say(f"warning: anyone who can reach {host}:{port} can use this page; it has no password")
    page.launch(
        server_name=host, server_port=port, share=False, inbrowser=False, quiet=True,
        prevent_thread_lock=True, max_file_size=service.limits.file_bytes, allowed_paths=[],
        show_error=True, ssr_mode=False, theme=gr.themes.Default(font=["system-ui", "sans-serif"]),
    )  # fmt: skip
    say(f"http://{host}:{port} (Ctrl-C ends it)")
    if block:
        try:
            page.block_thread()
        finally:
            page.close()
    return page


def summary(examples: Sequence[Example]) -> str:
    """How many examples each class has, in Markdown."""
    counts = Counter(example.label for example in examples)
    if not counts:
        return "No examples yet."
    listed = ", ".join(f"{escaped(name)}: {count}" for name, count in sorted(counts.items()))
    return f"Examples: {listed}"


def escaped(text: str) -> str:
    """A visitor's text as Markdown that shows it as it is."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text)


def answered(
    answer: Answer, files: Sequence[str]
) -> tuple[list[tuple[Any, str]], list[list[str]], str]:
    """An answer as a gallery, a table and a sentence."""
    best = [f"{p:.0%}" for p in answer.probabilities.max(1)]
    captions = [f"{name}, {p}" for name, p in zip(answer.labels, best, strict=True)]
    gallery = list(zip(answer.pictures, captions, strict=True))
    names = [f.replace("\\", "/").rpartition("/")[2] for f in files]
    table = [list(row) for row in zip(names, answer.labels, best, strict=True)]
    sentence = (
        f"Adapted to {answer.examples} examples of {len(answer.classes)} classes in"
        f" **{answer.adapting_ms:.0f} ms**, one forward pass; classified {len(files)} pictures in"
        f" {answer.classifying_ms:.0f} ms."
    )
    return gallery, table, sentence


def _gallery(examples: Sequence[Example]) -> list[tuple[Any, str]]:
    return [(example.picture, example.label) for example in examples]


def _told(error: type[Exception], call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns; a refusal as the error that the page shows."""
    try:
        return call(*arguments)
    except (ValueError, OSError) as refused:
        raise error(str(refused)) from None


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
