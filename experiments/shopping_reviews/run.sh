#!/bin/sh
# sh run.sh DATA/online_shopping_10_cats/online_shopping_10_cats.zip OUT, from the root of the repository
set -e
here=experiments/shopping_reviews
[ -f "$2/data/text.jsonl" ] || python $here/make.py "$1" "$2/data"
python launch.py --config=configs/lm.py:data=text,root="$2/data/text.jsonl",tokenizer=chars \
  --config.data.batch_size=24 --config.train.eval_every=1000 --workdir="$2/lm" | tail -n 1
for labels in 500 4000; do
  for adapt in scratch full lora probe bow; do
    options="--config.data.dataset.root=$2/data/$labels --config.train.epochs=$((labels == 500 ? 20 : 5))"
    recipe="configs/text_classify.py:root=$2/data/$labels,tokenizer=chars"
    case $adapt in
      bow) recipe="$recipe,model=bow" ;;
      scratch) recipe="$recipe,model=decoder" options="$options --config.task.model.depth=4" ;;
      *) recipe="$recipe,model=decoder,adapt=$adapt" options="$options --config.init_from=$2/lm" ;;
    esac
    echo "$labels $adapt"
    python launch.py --config="$recipe" $options --workdir="$2/$labels-$adapt" | tail -n 1
  done
done
