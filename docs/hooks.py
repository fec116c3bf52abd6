"""Pages made from what is there: the API reference from docstrings, the recipes, and the READMEs of the studies."""

import ast
import pathlib

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "bigbase_jax"


def rooms() -> dict[str, list[str]]:
    """Each file and folder of the package -> its modules, as they are imported."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] in ("__init__", "__main__"):
            continue
        found.setdefault(parts[1], []).append(".".join(parts))
    return found


def first_paragraph(docstring: str) -> str:
    return " ".join(docstring.split("\n\n")[0].split())


def api_page(room: str, modules: list[str]) -> str:
    beginning = PACKAGE / room / "__init__.py"
    about = ast.get_docstring(ast.parse(beginning.read_text())) if beginning.is_file() else None
    return "\n\n".join([f"# {room}", *([about] if about else []), *(f"::: {module}" for module in modules)])


def recipe_page(path: pathlib.Path) -> str:
    code = path.read_text()
    about = ast.get_docstring(ast.parse(code)) or ""
    beginning = f"---\nhide: [toc]\n---\n\n# {path.stem}\n\n{first_paragraph(about)}\n\n"
    return f'{beginning}```python title="configs/{path.name}"\n{code}```\n'


def measured() -> str:
    """The README's section of this name, as a page."""
    section = (ROOT / "README.md").read_text().partition("\n## Measured\n")[2].partition("\n## ")[0]
    return f"# Measured results\n{section.replace('](experiments/', '](studies/')}"


def pages() -> dict[str, dict[str, str | pathlib.Path]]:
    """Section -> path in the site -> its text, or the file that it is."""
    recipes = {f"recipes/{path.stem}.md": recipe_page(path) for path in sorted((ROOT / "configs").glob("*.py"))}
    studies: dict[str, str | pathlib.Path] = {}
    for readme in sorted((ROOT / "experiments").glob("*/README.md")):
        studies[f"studies/{readme.parent.name}/README.md"] = readme
        for picture in sorted(readme.parent.glob("*.png")):
            studies[f"studies/{readme.parent.name}/{picture.name}"] = picture
    reference = {f"api/{room}.md": api_page(room, modules) for room, modules in rooms().items()}
    return {"Recipes": {**recipes}, "Studies": studies, "API reference": {**reference}}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    for section, held in pages().items():
        named = {path.removesuffix("/README.md").removesuffix(".md").rpartition("/")[2]: path for path in held}
        entries = [{name: path} for name, path in named.items() if path.endswith(".md")]
        config.nav.append({section: entries})  # type: ignore[union-attr]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for held in pages().values():
        for path, page in held.items():
            if isinstance(page, str):
                files.append(File.generated(config, path, content=page))
            else:
                files.append(File.generated(config, path, abs_src_path=str(page)))
    files.append(File.generated(config, "results.md", content=measured()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to the studies and to the measured table as the repository has them -> as the site has them."""
    return markdown.replace("](../experiments/", "](studies/").replace("](../README.md#measured)", "](results.md)")
