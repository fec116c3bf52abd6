"""What the card of a run's data says of its files."""

import json

from bigbase_jax.data import card

MANIFEST = {
    "steps": [{"step": "read", "rows": 9}, {"step": "rules", "dropped": {"c4: few": 2, "gopher: many": 1}}],
    "files": [{"rows": 5}, {"rows": 1}],
    "kept": {"license": {"CC0": 6}},
    "forgotten": 1,
}


def test_licence_cleaning_and_consent(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("\n  The licence of nobody \n and more")
    (tmp_path / "train.csv").write_text("a")
    (tmp_path / ".clean").mkdir()
    (tmp_path / ".clean" / "manifest.json").write_text(json.dumps(MANIFEST))
    limits = {"consent": "agreed", "retention": "until"}
    config = {"dataset": {"parts": ({"root": str(tmp_path / "train.csv")}, {"root": str(tmp_path)}), "limits": limits}}
    assert card.origin(config) == {
        "licence": "LICENSE.txt: The licence of nobody",
        "cleaned": "6 of 9 documents, 3 by rules, 1 forgotten, licences CC0 6",
        "consent": "by the column agreed",
        "retention": "by the column until",
    }
    (tmp_path / ".clean" / "manifest.json").write_text('{"steps": 1}')
    assert "cleaned" not in card.origin(config) and card.origin({"root": "nowhere", "label": str(tmp_path)}) == {}
