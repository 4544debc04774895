"""The page on notation: its code, which compares its formulas with the library's, is run here in its order."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "THEORY.md"


def test_what_the_page_says_is_so():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 4 and sum(block.count("assert") for block in blocks) == 8
