"""What both the pages and the files above them need."""

from __future__ import annotations

import os

URL = os.environ.get("SITE_URL") or os.environ.get("READTHEDOCS_CANONICAL_URL")
SITE_URL = (URL or "https://concurrency-patterns.readthedocs.io/").rstrip("/") + "/"
CHINESE_FONTS = (
    '"PingFang SC", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei"'
)
FONTS = (
    '-apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", Arial, '
    f"{CHINESE_FONTS}, sans-serif"
)
MONOSPACE = (
    '"SFMono-Regular", Menlo, Consolas, Monaco, "Liberation Mono", "DejaVu Sans Mono", '
    f'"Noto Sans Mono CJK SC", {CHINESE_FONTS}, monospace'
)
