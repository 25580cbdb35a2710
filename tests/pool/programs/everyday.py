"""What programs do with a device besides training: each line printed is a number that a CPU gives alike."""

import copy
import threading
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

torch.set_num_threads(1)
warnings.simplefilter("ignore", DeprecationWarning)  # forward mode scripts its decompositions
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(1)
host = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
x = torch.randn(5, 6).to(device)
model = copy.deepcopy(host).to(device)

seen = []
handles = [model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.sum().item()))]
handles.append(
    model[0].register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].sum().item()))
)
handles.append(model[2].weight.register_hook(lambda gradient: gradient * 2))
model(x.clone().requires_grad_()).sum().backward()
for handle in handles:
    handle.remove()
print("hooks", sum(seen) + model[2].weight.grad.sum().item())

model.zero_grad()
checkpoint(model, x, use_reentrant=False).sum().backward()
print("checkpointing", model[0].weight.grad.sum().item())
checkpoint(nn.Dropout(0.0), x.clone().requires_grad_(), use_reentrant=True).sum().backward()

point = x.clone().requires_grad_()
(gradient,) = torch.autograd.grad(model(point).square().sum(), point, create_graph=True)
gradient.square().sum().backward()
print("double-backward", point.grad.sum().item())


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value**3

    @staticmethod
    def backward(ctx, gradient):
        (value,) = ctx.saved_tensors
        return gradient * 3 * value**2


point = x.clone().requires_grad_()
Cube.apply(point).sum().backward()
print("custom-function", point.grad.sum().item())

parameters = {name: value.detach() for name, value in model.named_parameters()}


def loss(parameters, row):
    return torch.func.functional_call(model, parameters, (row,)).square().sum()


each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
print("per-example-gradients", sum(value.abs().sum().item() for value in each.values()))
print("jacobian", torch.func.jacrev(model)(x[0]).sum().item())
_, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
print("forward-mode", tangent.sum().item())

sums = [0.0] * 4


def work(place):
    with torch.no_grad():
        sums[place] = sum(model(x * step).sum().item() for step in range(10 * place, 10 * place + 10))


threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("threads", sum(sums))

copied = copy.deepcopy(model)
copied[0].weight.data.zero_()
print("deepcopy", copied(x).sum().item() + model(x).sum().item())
back = copy.deepcopy(host)
back.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
print("state-to-host", back(x.cpu()).sum().item())
y = x.clone()
y[y > 0] = -1.0
y[:, 1].add_(2)
y.t()[0].copy_(torch.arange(5.0))
print("in-place", y.sum().item() + y[y < 0].numel() + y.nonzero().sum().item())
print("half", copy.deepcopy(model).half()(x.half()).float().mean().item())
trained = copy.deepcopy(host)
trained(torch.randn(5, 6)).sum().backward()
held = trained[0].weight
trained.to(device)  # after a gradient was taken
print("moved-late", trained[0].weight.grad.sum().item() * 0 + trained(x).sum().item())
