"""Which names does a hostile machine give itself? Everything that shows names is fed these."""

from __future__ import annotations

NASTY: tuple[str, ...] = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "&lt;b&gt;&#60;i&#62;",
    "]]><!--",
    "</style></title></textarea>",
    "javascript:alert(1)",
    "\x1b[2J\x1b[31mred\x1b]0;title\x07",
    "\x9b31mred",
    "line\nbreak\r\ttab\x00nul\x7fdel\x08back",
    "\u202egpj.exe\u2066\u200f",
    "zero\u200bwidth\ufeff",
    "za" + "\u0335\u0301" * 40 + "lgo",
    "\u2028paragraph\u2029",
    "\ud800lone",
    "[bold red]markup[/] [link=file:///etc/passwd]x[/link] [@click=app.quit]x[/]",
    "{{7*7}} ${7*7} {0.__class__} %s%n",
    "../../etc/passwd",
    "/..//%2e%2e/%00",
    "| table | `code` | **bold** [x](javascript:alert(1))",
    "--option=value",
    "x" * 5000,
    "漢字 emoji 👩\u200d👩\u200d👧",
    "",
    " ",
)
