import json, torch, sys
sys.path.insert(0,'.')
from collections import defaultdict
from dvr1_lite.toy.examination import Examiner, accuracy
from dvr1_lite.policy import Policy
from dvr1_lite.data import read_records
p=Policy.load('data/base_model')
ex=Examiner(p,8,28,torch.Generator().manual_seed(0))
by=defaultdict(list)
for r in read_records('data/toyvideoqa/tune.jsonl'): by[r.question_type].append(r)
for k,rows in by.items():
    rows=rows[:100]
    print(k,{s:(round(accuracy(ex.ask(rows,2,noise=s)),3)) for s in (0.,.15,.3,.45,.6)},flush=True)
