"""The column headings of generated tables in README.zh-CN.md. Names and cells stay as the code has them."""

from __future__ import annotations

import re

HEADINGS = {
    "computes": "计算内容",
    "dtypes": "数据类型",
    "differentiable in": "可求导的输入",
    "beyond CANN": "超出 CANN 之处",
    "op": "算子",
    "argument": "参数",
    "limit": "限制",
    "CANN documents": "CANN 文档的限制",
    "operator": "算子",
    "tokens": "token 数",
    "slowest kernel, its busiest": "最慢的内核，其最忙的单元",
    "context": "上下文长度",
    "dense attention": "稠密注意力",
    "all three operators": "三个算子合计",
    "dense ÷ all three": "稠密 ÷ 三者合计",
    "compressed attention": "压缩注意力",
    "selected attention": "选择注意力",
    "compression": "压缩",
    "measured": "测量项",
    "torch, same run": "torch，同一次运行",
    "ratio": "比值",
}
HEADING_ROW = re.compile(r"^\| (.+) \|\n(?=\| ---)", re.MULTILINE)


def headings(text: str) -> list[str]:
    """Of all tables of a text."""
    return [heading for row in HEADING_ROW.findall(text) for heading in row.split(" | ")]


def translated(part: str) -> str:
    """A generated part with its headings in Chinese."""
    return HEADING_ROW.sub(lambda row: f"| {' | '.join(HEADINGS.get(h, h) for h in row[1].split(' | '))} |\n", part)
