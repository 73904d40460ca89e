"""Print constraints that pin every dependency to the oldest version that pyproject.toml allows.

python scripts/oldest_constraints.py > oldest.txt
"""

import re
import tomllib
from pathlib import Path


def oldest(project: dict[str, object]) -> list[str]:
    """`name==version` for each requirement of a `[project]` table, its extras included.

    Raises:
        ValueError: A requirement has no lower bound.
    """
    extras = project.get("optional-dependencies", {})
    assert isinstance(extras, dict)
    requirements: list[str] = [*project["dependencies"], *(r for extra in extras.values() for r in extra)]  # type: ignore[misc]
    pins = []
    for requirement in requirements:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[.*?\])?\s*>=\s*([0-9][^,;\s]*)", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} in pyproject.toml must name its oldest version, as in 'torch>=2.6'")
        pins.append(f"{match[1]}=={match[2]}")
    return sorted(set(pins))


if __name__ == "__main__":
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    print("\n".join(oldest(tomllib.loads(pyproject.read_text())["project"])))
