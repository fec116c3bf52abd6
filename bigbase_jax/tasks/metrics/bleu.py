"""How close written texts come to references."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_SCRIPTS = (  # of languages that do not put spaces between words, and what BLEU takes for words there
    (r"[\u3040-\u30ff]", "ja-mecab"),  # kana; without MeCab, characters
    (r"[\uac00-\ud7af]", "ko-mecab"),
    (r"[\u3400-\u9fff\uf900-\ufaff]", "zh"),
    (r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]", "char"),  # Thai, Lao, Burmese, Khmer
)


def scores(
    texts: Sequence[str], references: Sequence[str], others: Sequence[Sequence[str | None]] = ()
) -> dict[str, Any]:
    """``bleu`` (Papineni et al. 2002) and ``chrf`` (Popović 2015), both by sacrebleu, 0 to 100. What BLEU takes for
    words follows the script of the references; ``bleu_signature`` is sacrebleu's line about it.

    Args:
      others: more references of each text, None where it has no more.
    """
    import sacrebleu

    measure = sacrebleu.BLEU(tokenize=bleu_words(references))
    every: Any = [references, *others]
    return {
        "bleu": measure.corpus_score(texts, every).score,
        "bleu_signature": str(measure.get_signature()),
        "chrf": sacrebleu.corpus_chrf(texts, every).score,
    }


def bleu_words(texts: Sequence[str]) -> str:
    """sacrebleu's tokenizer for texts of this script: "zh", "ja-mecab" and "ko-mecab" ("char" where MeCab is not
    installed: ``sacrebleu[ja]``, ``sacrebleu[ko]``), "char" for other scripts without spaces, and otherwise "13a"."""
    letters = "".join(filter(str.isalpha, "".join(texts)))
    shares = [len(re.findall(script, letters)) / max(len(letters), 1) for script, _ in _SCRIPTS]
    if sum(shares) < 0.5:
        return "13a"
    at = 0 if shares[0] > 0.1 else int(np.argmax(shares))  # kana stand between ideographs
    needs, name = {0: "MeCab", 1: "mecab_ko"}.get(at), _SCRIPTS[at][1]
    return "char" if needs and importlib.util.find_spec(needs) is None else name
