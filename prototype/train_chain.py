r"""Trial: warm start from a model folder, then the chain phase only. train_chain.py OUT STEPS LR CLIPS [START]"""
import sys, time, json, os, torch
from dataclasses import replace, asdict
from pathlib import Path
from transformers import Qwen2_5_VLForConditionalGeneration, AutoTokenizer
from dvr1_lite.toy import recipe as R
out, steps, lr, clips = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
start = sys.argv[5] if len(sys.argv) > 5 else 'data/base_model.v1'
batch = int(os.environ.get('BATCH', 96))
torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
rec = R.Recipe(clips=clips, text_steps=steps, text_lr=lr, text_batch=batch, seed=int(os.environ.get('SEED', 2)))
tok = R.build_tokenizer(); R.DEPTH = 2; model = R.build_model(tok, 0).train()
print('tokens', len(tok))
old = Qwen2_5_VLForConditionalGeneration.from_pretrained(start); oldtok = AutoTokenizer.from_pretrained(start)
state = old.state_dict(); name = [k for k in state if k.endswith('embed_tokens.weight')][0]
new = model.state_dict()[name].clone(); voc = oldtok.get_vocab()
for w, i in tok.get_vocab().items():
    if w in voc: new[i] = state[name][voc[w]]
state = dict(state); state[name] = new
if 'lm_head.weight' in state: state['lm_head.weight'] = new
print(model.load_state_dict(state, strict=False)); model.tie_weights()
if os.environ.get('ENCFILE'):
    import copy
    old_visual = copy.deepcopy(model.model.visual)
    model.model.visual.load_state_dict(torch.load(os.environ['ENCFILE'])['visual'])
    small = R.make_pool(77, 100); quiet = replace(rec, noise_share=0.0); g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        new_f = R.encode(model, small.pixels, quiet, g).flatten(0, 2)
        kept = model.model.visual; model.model.visual = old_visual
        old_f = R.encode(model, small.pixels, quiet, g).flatten(0, 2)
        model.model.visual = kept
        x = torch.cat([new_f, torch.ones(len(new_f), 1)], 1).double(); y = old_f.double()
        w = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1]), x.T @ y)
        print('aligned, R2', 1 - ((x @ w - y) ** 2).sum().item() / ((y - y.mean(0)) ** 2).sum().item())
        last = model.model.visual.merger.mlp[2]
        last.bias.copy_((last.bias.double() @ w[:-1] + w[-1]).float()); last.weight.copy_((w[:-1].T @ last.weight.double()).float())
    del small, old_visual
model.model.visual.requires_grad_(False)
t = time.time()
cache = Path(f'cache_{os.environ.get("ENC", "base_model.v1")}_{clips}.pt')
if cache.exists():
    scenes, features = torch.load(cache, weights_only=False)
    pool = R.Pool(scenes, None, {})
else:
    pool = R.make_pool(0, clips); print('pool', time.time() - t)
    features = R.encode_pool(model, pool, rec); print('encoded', time.time() - t, flush=True)
    torch.save((pool.scenes, features), cache)
    pool.pixels = None

def save():
    model.save_pretrained(out); tok.save_pretrained(out)
    v = model.config.vision_config
    (out / 'preprocessor_config.json').write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor", "patch_size": v.patch_size, "merge_size": v.spatial_merge_size, "temporal_patch_size": v.temporal_patch_size, "image_mean": R.MEAN, "image_std": R.STD}))

count = [0]; plain = R.answer_loss
def loss(*a, **k):
    count[0] += 1
    if count[0] % 100 == 0: print(count[0], round(time.time() - t), flush=True); save()
    return plain(*a, **k)
R.answer_loss = loss
print('final', R.finetune(model, tok, pool, features, rec), time.time() - t)
save()
