r"""exam.py MODEL PROMPTS [FILE] [types]: table of cells"""
import sys, json, torch, time
from dvr1_lite.toy.examination import *
torch.set_num_threads(1)
t=time.process_time()
p=Policy.load(sys.argv[1]); n=int(sys.argv[2]); f=sys.argv[3] if len(sys.argv)>3 else 'data/toyvideoqa/cells_test.jsonl'
from dvr1_lite.data import read_records
r=examine_cells(p, read_records(f), num_frames=8, prompts_per_cell=n, progress=False)
json.dump(r, open(sys.argv[1]+f'/cells_{n}.json','w'), indent=1)
print('cell target success factor log10 step | hints 0 1 4 8 12 16 | hint_err empty noise | blind one shuffled')
for k,v in r.items():
    print(f"{k:9s} {v['target']:.4f} {v['success']:.5f} {v['factor']:.2f} {v['log10']:.2f} {v['step']:.3f} |", ' '.join(f'{x:.4f}' for x in v['hint'].values()), f"| {v['hint_error']:.3f} {v['empty_hint']:.2f} {v['noise']:.2f} |", ' '.join(f'{x:.2f}' for x in v['controls'].values()))
print('seconds', time.process_time()-t)
