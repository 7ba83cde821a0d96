"""Graph RAG: items are nodes, nearest neighbours are edges, communities have summaries, and those are searched first.

    python examples/graph_rag.py MODEL [OUTPUT]

MODEL is the folder or Hub id of a finished model, e.g. demo-output/training/model. OUTPUT (example-output by default)
receives drawn pictures, an index of items, one of communities, and graph.graphml, which Gephi and yEd open. Needs
networkx.

A question about a whole field ("what are these contracts about?") has no single passage that answers it. So:

1. Index the items, and ask with each of them: its nearest neighbours become its edges, their cosines the weights.
2. Find communities, groups of items that are nearer to each other than to the rest (Louvain).
3. Sum up each community, and index the summaries. Here a summary is the texts of the most central members; in earnest
   a language model writes it from the members.
4. A question finds communities first, then items within them, then what those are linked to.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import networkx
from PIL import Image, ImageDraw

from sentence_vipyloqwen import VectorIndex, ViPyloQwen

NEIGHBOURS = 3
IN_A_SUMMARY = 3


def draw_circle(path: Path, color: str) -> str:
    """Draw a filled circle; the path of the picture."""
    image = Image.new("RGB", (84, 84), "white")
    ImageDraw.Draw(image).ellipse((18, 18, 66, 66), fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)


def query_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item as a query for what is like it."""
    return {"text": item["text"], "image": item["image"]}


def neighbour_graph(index: VectorIndex, neighbours: int) -> networkx.Graph:
    """Link each item to its nearest; the weight of an edge is their cosine, none below 0."""
    items = index.items
    graph = networkx.Graph()
    graph.add_nodes_from(item["id"] for item in items)
    for item, hits in zip(items, index.search([query_of(item) for item in items], k=neighbours + 1), strict=True):
        near = [hit for hit in hits if hit.id != item["id"]][:neighbours]
        graph.add_weighted_edges_from((item["id"], hit.id, max(hit.score, 0.0)) for hit in near)
    return graph


def summary_of(index: VectorIndex, graph: networkx.Graph, members: Collection[str]) -> str:
    """Sum up a community: the texts of its most central members. A language model would do better."""
    central = networkx.degree_centrality(graph.subgraph(members))
    first = sorted(members, key=lambda id: (-central[id], id))[:IN_A_SUMMARY]
    return "\n".join(index.get(id)["text"] or index.get(id)["metadata"]["caption"] for id in first)


if __name__ == "__main__":
    model_path, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "example-output")
    model = ViPyloQwen(model_path)

    # 1. Items, and the graph of their neighbours.
    texts = [
        "Bên A thanh toán trong 30 ngày.",
        "Bên A trả trước 20 phần trăm giá trị hợp đồng.",
        "Chậm thanh toán chịu lãi 0,05 phần trăm một ngày.",
        "Bên B bảo mật thông tin khách hàng.",
        "Thông tin mật không được tiết lộ cho bên thứ ba.",
        "Nghĩa vụ bảo mật kéo dài 5 năm.",
    ]
    items: list[dict[str, Any]] = [{"id": f"clause {number}", "text": text} for number, text in enumerate(texts, 1)]
    for color, caption in {"red": "một hình tròn màu đỏ", "green": "một hình tròn màu xanh lá cây"}.items():
        picture = draw_circle(output / f"{color}.png", color)
        items.append({"id": f"{color} circle", "image": picture, "metadata": {"caption": caption}})
    index = VectorIndex.build(model, items, output / "index", overwrite=True)
    graph = neighbour_graph(index, NEIGHBOURS)
    networkx.write_graphml(graph, output / "graph.graphml")

    # 2. Communities, each in the order of its ids.
    communities = [sorted(members) for members in networkx.community.louvain_communities(graph, seed=0)]

    # 3. Their summaries, as units of retrieval.
    summaries = [
        {"id": f"community {number}", "text": summary_of(index, graph, members), "metadata": {"members": members}}
        for number, members in enumerate(communities, 1)
    ]
    overview = VectorIndex.build(model, summaries, output / "communities", overwrite=True)

    # 4. From the community to its items, and on along the edges.
    question = "Các điều khoản bảo mật nói gì?"
    community = overview.search(question, k=1)[0]
    print(f"{question}\n  {community.score:.4f}  {community.id}: {', '.join(community.item['metadata']['members'])}")
    inside = [id.replace("'", "''") for id in community.item["metadata"]["members"]]
    for hit in index.search(question, k=2, where="id IN ('" + "', '".join(inside) + "')"):
        print(f"  {hit.rank}. {hit.score:.4f}  {hit.id}, linked to {', '.join(sorted(graph[hit.id]))}")
    print(f"{len(graph)} nodes, {graph.number_of_edges()} edges, {len(communities)} communities in {output}")
