import sys, torch
torch.set_num_threads(1)
from collections import defaultdict
from dvr1_lite.toy.examination import Examiner, accuracy
from dvr1_lite.policy import Policy
from dvr1_lite.data import read_records
p=Policy.load(sys.argv[1]); n=int(sys.argv[2])
ex=Examiner(p,8,32,torch.Generator().manual_seed(0))
by=defaultdict(list)
for r in read_records('data/toyvideoqa/tune.jsonl'): by[r.question_type].append(r)
for k,rows in by.items():
    rows=rows[:n]
    print(k, 'sampled', {s: round(accuracy(ex.ask(rows,2,noise=s)),3) for s in (0.,.3)}, 'greedy', round(accuracy(ex.ask(rows,1,greedy=True)),3), 'hint .25 .5', round(accuracy(ex.ask(rows,1,hint=.25)),2), round(accuracy(ex.ask(rows,1,hint=.5)),2), 'blind', round(accuracy(ex.ask(rows,1,control='blind')),2), 'answer shown', round(accuracy(ex.ask(rows,1,show_answer=True)),2), flush=True)
