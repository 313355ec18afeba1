"""Dense Adam over a whole table: what Adam on rows must equal."""

import torch


class DenseAdam:
    """The reference: torch.optim.Adam over the whole table, one step at a time."""

    def __init__(self, weights, betas, eps):
        self.weights = torch.nn.Parameter(weights.clone())
        self.optimizer = torch.optim.Adam([self.weights], lr=1.0, betas=betas, eps=eps, fused=True)

    def step(self, grad, lr):
        self.optimizer.param_groups[0]["lr"] = lr
        self.weights.grad = grad
        self.optimizer.step()

    def parts(self):
        state = self.optimizer.state[self.weights]
        return [self.weights.detach(), state["exp_avg"], state["exp_avg_sq"]]
