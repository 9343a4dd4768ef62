import gc
import os
import platform
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualnn.engine import compile
from dualnn.engine.errors import DualInputError
from dualnn.training.meters import LiveBytes, ProcessError, Work, forward_equivalents, peak_rss_of

N = 1000  # elements, of 4 bytes each
NBYTES = 4 * N


class TestLiveBytes:
    def test_a_program_may_be_recorded_meanwhile(self):
        """Recording runs on fake tensors, which have a size and no memory."""
        x = torch.zeros(1000, dtype=torch.float32)
        with LiveBytes() as m:
            compile(lambda x: torch.sin(x) + torch.ones(1000), backend="eager")(x)
        assert 4000 <= m.peak <= 12000  # the sine, the ones, their sum

    def test_counts_storages_once_each(self):
        x = torch.ones(N)
        with LiveBytes() as m:
            y = x + 1
            views = [y.view(10, 100), y[3:], y.detach(), y.t(), y.expand(3, N), y.reshape(100, 10)]
            y.mul_(2)
            y[:5].zero_()
            torch.add(x, 1, out=y)
        assert m.current == m.peak == NBYTES
        del y
        assert m.current == NBYTES  # the views hold it
        del views
        assert m.current == 0

    def test_what_existed_before_does_not_count(self):
        x = torch.ones(N)
        with LiveBytes() as m:
            x.add_(1)
            _ = x[2:].view(-1)
        assert m.peak == 0

    def test_peak_is_of_what_lives_at_once(self):
        x = torch.ones(N)
        with LiveBytes() as m:
            for _ in range(10):
                x = x + 1
        assert m.peak == 2 * NBYTES  # the old and the new one

    def test_tensors_from_outside_torch_count(self):
        with LiveBytes() as m:
            x = torch.tensor([1.0, 2.0])
            y = torch.from_numpy(np.zeros(3))
        assert m.current == x.nbytes + y.nbytes == 32

    def test_resized_storage(self):
        with LiveBytes() as m:
            x = torch.zeros(10)
            x.resize_(N)
            assert m.current == NBYTES
            x.resize_(5)  # torch keeps the memory
            assert m.current == NBYTES

    def test_sparse_and_meta(self):
        with LiveBytes() as m:
            dense = torch.eye(4)
            sparse = dense.to_sparse()
            _ = torch.empty(N, device="meta") + 1
            del dense
            assert m.current == sparse._indices().nbytes + sparse._values().nbytes == 64 + 16

    @staticmethod
    def chain(depth, how):
        """y = sin(w y), `depth` times: autograd keeps y and w y of every step."""
        w = torch.ones((), requires_grad=True)

        def run(y, steps):
            for _ in range(steps):
                y = torch.sin(y * w)
            return y

        x = torch.ones(N)
        with LiveBytes() as m:
            if how == "no_grad":
                with torch.no_grad():
                    run(x, depth)
            elif how == "backward":
                run(x, depth).sum().backward()
            else:
                for _ in range(depth // 8):
                    x = checkpoint(run, x, 8, use_reentrant=False)
                x.sum().backward()
        return m

    def test_saved_activations_grow_with_depth(self):
        peaks = {depth: self.chain(depth, "backward").peak for depth in (8, 16, 32)}
        assert peaks[16] - peaks[8] == 8 * 2 * NBYTES
        assert peaks[32] - peaks[16] == 16 * 2 * NBYTES

    def test_no_grad_is_flat(self):
        assert self.chain(8, "no_grad").peak == self.chain(64, "no_grad").peak == 3 * NBYTES

    def test_checkpointing_lowers_the_peak(self):
        assert self.chain(64, "checkpoint").peak < self.chain(64, "backward").peak / 4

    def test_backward_is_measured_and_leaves_only_gradients(self):
        w = torch.ones(N, requires_grad=True)
        loss = (w.sin() * w).sum()
        with LiveBytes() as m:
            loss.backward()
        assert m.peak >= 2 * NBYTES and m.current == w.grad.nbytes

    def test_modes_nest(self):
        with LiveBytes() as outer:
            kept = torch.ones(N)
            with LiveBytes() as inner:
                both = kept + 1
        assert (inner.current, outer.current) == (NBYTES, 2 * NBYTES)
        del both, kept
        assert (inner.current, outer.current) == (0, 0)

    def test_autograd_s_in_place_check_stays_on(self):
        w = torch.ones(3, requires_grad=True)
        with LiveBytes():
            y = (w * 2).exp()
            y[0] = 0
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()

    def test_gradients_are_unchanged(self):
        net, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)), torch.randn(4, 1, 8, 8)
        net(x).logsumexp(1).sum().backward()
        expected = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        with LiveBytes(), Work():
            net(x).logsumexp(1).sum().backward()
        for parameter, grad in zip(net.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, grad)

    def test_inference_mode_shows_the_parts_of_composite_operations(self):
        def three():
            return torch.nn.functional.cosine_similarity(torch.ones(N, 2), torch.ones(N, 2))

        peaks = []
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), LiveBytes() as m:
                three()
            peaks.append(m.peak)
        assert peaks[0] == peaks[1] > 2 * 2 * NBYTES


class TestWork:
    def test_products(self):
        a, b, v = torch.ones(2, 3), torch.ones(3, 4), torch.ones(3)
        with Work() as work:
            _ = a @ b
        assert (work.products, work.others) == (2 * 2 * 3 * 4, 0)
        for product, count in [
            (lambda: a @ v, 2 * 2 * 3),
            (lambda: v @ v, 2 * 3),
            (lambda: torch.addmv(torch.ones(2), a, v), 2 * 2 * 3),
            (lambda: torch.einsum("bij,jk->bik", a.expand(5, 2, 3), b), 2 * 5 * 2 * 3 * 4),
            (lambda: nn.functional.linear(a, b.t()), 2 * 2 * 3 * 4),
            (lambda: nn.functional.conv2d(torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)), 2 * 3 * 9 * 2 * 9),
        ]:
            with Work() as work:
                product()
            assert work.products == count

    def test_elementwise_operations_count_their_results(self):
        x = torch.ones(N)
        with Work() as work:
            y = x.sin()
            y.mul_(2)
            y.sum()
        assert (work.products, work.others) == (0, 2 * N + 1)

    def test_views_and_empty_memory_are_free(self):
        x = torch.ones(N)
        with Work() as work:
            _ = x.view(10, 100).t()[2:].expand(3, 98, 10).detach(), x.chunk(4), torch.empty(N), torch.empty_like(x)
            _ = x.reshape(10, 100), x.unbind()
        assert work.total == 0

    def test_operations_on_lists_count_what_they_write(self):
        xs = [torch.ones(N), torch.ones(N)]
        with Work() as work:
            torch._foreach_add_(xs, 1.0)
        assert work.others == 2 * N

    def test_inference_mode_counts_the_same(self):
        net, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)), torch.ones(3, 8)
        counts = []
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode(), Work() as work:
                net(x)
            counts.append((work.products, work.others))
        assert counts == [(2 * 3 * (8 * 16 + 16 * 2), 3 * 16)] * 3

    def test_backprop_costs_three_forwards_less_the_input_gradient(self):
        net, x = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(10)]), torch.ones(32, 64)

        def step():
            net(x).backward(torch.ones(32, 64))

        with Work() as forward:
            net(x)
        with Work() as work:
            step()
        assert work.products == forward.products * (3 - 1 / 10)
        assert forward_equivalents(step, lambda: net(x)) == pytest.approx(2.9, abs=0.05)

    def test_forward_without_work(self):
        with pytest.raises(DualInputError, match="ran no torch operation"):
            forward_equivalents(lambda: torch.ones(3), lambda: None)


class TestPeakRss:
    def test_a_command(self):
        small = peak_rss_of([sys.executable, "-S", "-c", "pass"])
        large = peak_rss_of([sys.executable, "-S", "-c", "b'x' * 60_000_000"])
        assert 55_000_000 < large - small < 65_000_000

    def test_this_process_s_own_size_does_not_count(self):
        held = b"x" * 300_000_000
        assert peak_rss_of([sys.executable, "-S", "-c", "pass"]) < 100_000_000
        del held
        gc.collect()

    def test_a_function(self):
        assert peak_rss_of(platform.platform) < 100_000_000  # its process has not imported torch
        with pytest.raises(ProcessError, match="ended with code -6"):
            peak_rss_of(os.abort)

    @pytest.mark.parametrize("function", [lambda: None, lambda: 1])
    def test_functions_without_a_name(self, function):
        with pytest.raises(DualInputError, match="cannot be imported in a fresh process"):
            peak_rss_of(function)

    def test_failing_command_shows_its_last_words(self):
        with pytest.raises(ProcessError, match="ended with code 3:\nlast words"):
            peak_rss_of([sys.executable, "-S", "-c", "print('last words'); raise SystemExit(3)"])

    def test_missing_command(self):
        with pytest.raises(ProcessError, match="could not be started"):
            peak_rss_of(["no-such-program-here"])

    def test_timeout_ends_the_process(self):
        with pytest.raises(ProcessError, match="more than 0.5 s"):
            peak_rss_of([sys.executable, "-S", "-c", "import time; time.sleep(60)"], timeout=0.5)

    def test_environment(self):
        code = "import os; raise SystemExit(os.environ.get('MARK') != 'here')"
        assert peak_rss_of([sys.executable, "-S", "-c", code], env={"MARK": "here"}) > 0
