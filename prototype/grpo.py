r"""grpo.py MODEL STEPS LR [key=value ...]: one run on cells_train; success per cell before and after, seconds."""
import sys, json, time, torch, random
from dataclasses import replace
torch.set_num_threads(1)
from dvr1_lite.config import make_config
from dvr1_lite.data import read_records
from dvr1_lite.lab.variants import trainer_class
from dvr1_lite.toy.examination import *
extra = dict(a.split('=') for a in sys.argv[4:])
files = extra.pop('files', 'cells_train'); keep = extra.pop('cells', '').split(','); kinds = extra.pop('types', 'tally,cell,since').split(',')
for k, v in extra.items():
    try: extra[k] = json.loads(v)
    except json.JSONDecodeError: pass
config = make_config(dict(model=sys.argv[1], steps=int(sys.argv[2]), learning_rate=float(sys.argv[3]), max_new_tokens=32,
                          **{'method': 'grpo', 'augment': 'none', 'quantization': 'nf4'} | extra))
records = [r for f in files.split('+') for r in read_records(f'data/toyvideoqa/{f}.jsonl')]
if keep != ['']: records = [r for r in records if cell_of(r) in keep]
records = [r for r in records if r.question_type in kinds or files != 'cells_train']
test = read_records('data/toyvideoqa/cells_test.jsonl')
by = defaultdict(list)
for r in test:
    if r.question_type in kinds and (keep == [''] or cell_of(r) in keep): by[f'{r.question_type}-{cell_of(r)}'].append(r)
trainer = trainer_class(config)(config, records)
def table():
    ex = Examiner(trainer.policy, 8, 0, torch.Generator(), batch=100)
    return {k: float(np.exp(ex.success(v[:int(__import__("os").environ.get("N", 60))]).sum(1)).mean()) for k, v in by.items()}
before = table(); t, c = time.time(), time.process_time()
phases = defaultdict(float); rewards = []
while not trainer.done:
    m = trainer.step()
    for k, v in m['seconds'].items(): phases[k] += v
    if trainer.steps % 10 == 0: print(trainer.steps, round(time.process_time() - c), {k: round(m[k], 3) for k in ('accuracy', 'reward_after', 'vanishing', 'vanishing_after', 'completion_tokens') if k in m}, trainer.rollouts, flush=True)
print('wall', time.time() - t, 'cpu', time.process_time() - c, 'rollouts', trainer.rollouts, {k: round(v) for k, v in phases.items()})
after = table()
for k in before: print(f'{k:9s} {before[k]:.5f} -> {after[k]:.5f}')
