"""Searching an index: in the terminal, and in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sentence_vipyloqwen.cli.shared import Device, ModelAndIndex, make_screen, open_index


def search(
    model_and_index: ModelAndIndex,
    text: Annotated[str | None, typer.Option(help="Text of the query.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image of the query; may be given up to five times.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Task of the query: ocr, vqa_single, ...")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results.")] = 10,
    where: Annotated[
        str | None,
        typer.Option(help="Only items whose metadata satisfy this, as in SQL: \"lang = 'vi' AND page < 3\"."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare every vector, whatever the kind of index.")] = False,
    effort: Annotated[
        int | None,
        typer.Option(min=1, help="How far an approximate index looks: lists of an IVF, nodes of an HNSW."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the results as a page with thumbnails.")] = None,
    device: Device = None,
) -> None:
    """Search an index by a text, by images, or by both together.

    Scores are cosines of the whole vectors, whatever the kind of index; only what an approximate one overlooks is
    missing. `--exact` shows what that is, a higher `--effort` overlooks less and takes longer.

    Examples:

    `vipyloqwen search my-index --text "hóa đơn"`, with the model that the index was built with

    `vipyloqwen search run/model my-index --text "hóa đơn"`, where that model lies elsewhere now
    """
    from rich.table import Table

    from sentence_vipyloqwen.index import SearchResult, write_report

    query = {key: value for key, value in (("text", text), ("image", list(map(str, image or [])))) if value}
    if not query:
        raise ValueError("A query needs --text, --image, or both.")
    opened = open_index(model_and_index, device)
    hits = opened.search(query, k=k, prompt_name=prompt_name, where=where, exact=exact, effort=effort)
    table = Table("rank", "score", "id", "text", "image")
    for hit in hits:
        images = ", ".join(Path(path).name for path in hit.item.get("image", []))
        table.add_row(
            str(hit.rank), f"{hit.score:.4f}", escape(hit.id), escape(hit.item.get("text", "")), escape(images)
        )
    screen = make_screen()
    screen.print(table)
    if html:
        write_report(html, [SearchResult(query, hits, prompt_name, where)])
        screen.print(f"Wrote {html}.")


def ui(
    model_and_index: ModelAndIndex,
    host: Annotated[
        str, typer.Option(help="Address to listen at; other computers reach the page only if you change it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8765,
    name: Annotated[
        list[str] | None,
        typer.Option(help="A further name under which the page may be asked for; may be given often."),
    ] = None,
    device: Device = None,
) -> None:
    """Search an index in the browser: type, drop or paste images, choose a prefix, filter, look at what is found.

    The page is served on this computer alone, and shows no file but the images of the index's items. What you ask with
    is kept nowhere. Needs the `ui` extra. Ctrl-C ends it.

    **Asking.** Words, images, or both; a prefix says what kind of question it is, as `--prompt-name` does in `search`.
    The condition is that of `search --where`: `lang = 'vi' AND page < 3`. Click a fact of a result to filter by it, a
    picture to enlarge it, and *More like this* to go on from a result; words added then narrow it down.

    **Other computers.** `--host 0.0.0.0 --name my-server` lets them in who ask for `my-server`: there is no password
    and no encryption, so do that only in a network you trust.

    Examples:

    `vipyloqwen ui my-index`, with the model that the index was built with

    `vipyloqwen ui run/model my-index`, where that model lies elsewhere now
    """
    from sentence_vipyloqwen.extras import require

    for module in ("fastapi", "python_multipart", "uvicorn"):
        require(module, "ui")
    from sentence_vipyloqwen.index.ui import serve

    loaded = open_index(model_and_index, device)
    make_screen().print(f"{len(loaded)} items, to search at http://{host}:{port} (Ctrl-C ends it)")
    serve(loaded, host=host, port=port, host_names=name or ())
