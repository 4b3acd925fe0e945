r"""train_enc.py OUT STEPS CLIPS SHARE MAX_NOISE: the perception stage from scratch; accuracy of its heads by environment and sigma."""
import sys, time, torch, numpy as np
from dataclasses import replace
torch.set_num_threads(1)
from dvr1_lite.toy import recipe as R
from dvr1_lite.augmentation import add_noise
out, steps, clips, share, top = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])
seed = int(sys.argv[6]) if len(sys.argv) > 6 else 0
rec = R.Recipe(seed=seed, clips=clips, encoder_steps=steps, noise_share=share, max_noise=top)
tok = R.build_tokenizer(); model = R.build_model(tok, seed).train()
pool = R.make_pool(seed, clips); t = time.time(); c = time.process_time()
kept = {}
plain = R.PerceptionHeads
class Heads(plain):
    def __init__(self, *a): super().__init__(*a); kept['heads'] = self
R.PerceptionHeads = Heads
print(R.train_encoder(model, pool, rec), time.time() - t, 'cpu', time.process_time() - c, flush=True)
torch.save({'visual': model.model.visual.state_dict(), 'heads': kept['heads'].state_dict()}, out)
def accuracy(sigma, environment):
    p = R.make_pool(999, 60, (environment,))
    r = replace(rec, noise_share=1.0, max_noise=0.0)
    f = p.pixels.astype(np.float32) / 255
    if sigma: f = np.clip(f + sigma * np.random.RandomState(0).randn(*f.shape), 0, 1)
    with torch.no_grad():
        tokens = R.encode(model, (f * 255 + .5).astype(np.uint8), r, torch.Generator().manual_seed(0))
        return {k: round(v, 3) for k, v in kept['heads'](tokens, p.labels)[1].items()}
for e in ('wide', 'meadow', 'harbour'):
    for s in (0, .1, .2, .3, .4): print(e, s, accuracy(s, e), flush=True)
