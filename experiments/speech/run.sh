#!/bin/bash
# Recognition on small real corpora: AN4, yesno, and SpeechBrain's twelve sentences. BIGBASE_DATA holds an4, yesno and
# speechbrain_asr12. Prints core-seconds (user + sys) of each.
set -e
cd "$(dirname "$0")/../.."
timed() { local name=$1; shift; /usr/bin/env time -f "$name: user %U s, sys %S s, wall %e s" "$@"; }
timed an4 python launch.py --workdir="runs/an4" --config=configs/speech.py:root="$BIGBASE_DATA/an4",seconds=7.2,epochs=45
timed yesno python launch.py --workdir="runs/yesno" \
  --config=configs/speech.py:root="$BIGBASE_DATA/yesno",rate=8000,seconds=8,size=nano,tokenizer=words,epochs=60 \
  --config.task.model.encoder.width=48 --config.task.model.encoder.depth=2 --config.task.model.encoder.taps=5 \
  --config.task.model.encoder.subsampling=8 --config.data.dataset.frame_seconds=0.08 \
  --config.task.mels=20 "--config.task.frequency_masks=(2,4)" --config.optim.learning_rate=5e-3 \
  --config.data.batch_size=8 "--config.data.buckets=()" --config.train.eval_every=60 --config.train.log_every=20 --config.train.best_metric=loss
timed asr12 python launch.py --workdir="runs/asr12" \
  --config=configs/speech.py:root="$BIGBASE_DATA/speechbrain_asr12",seconds=5,size=nano,epochs=40 \
  --config.data.batch_size=8 --config.train.eval_every=20 "--config.data.buckets=()"
