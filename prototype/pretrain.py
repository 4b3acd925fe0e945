import sys, torch, json, time
torch.set_num_threads(1)
from dvr1_lite.toy import recipe as R
import dvr1_lite.toy.recipe
seed, out = int(sys.argv[1]), sys.argv[2]
plain = R.train_encoder
def tell(model, pool, recipe):
    t = time.time(); r = plain(model, pool, recipe); print('ENCODER', r, time.time() - t, flush=True)
    torch.save(model.model.visual.state_dict(), out + '.visual.pt'); return r
R.train_encoder = tell
keep = R.finetune
def fine(model, tok, pool, features, recipe):
    t = time.time(); r = keep(model, tok, pool, features, recipe); print('PHASE', recipe.seed, r, time.time() - t, flush=True)
    model.save_pretrained(f'{out}.phase{recipe.seed}'); tok.save_pretrained(f'{out}.phase{recipe.seed}'); return r
R.finetune = fine
print(R.pretrain(out, R.Recipe(seed=seed)))
