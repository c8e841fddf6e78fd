"""A welded model computes in channels_last memory where nobody can see it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchweld as tw
from torch import nn
from torchweld.convert._layout import seen_by

CHANNELS_LAST = torch.channels_last


class Net(nn.Module):
    """Two fused patterns, and a head as ``finish`` has it."""

    def __init__(self, finish=lambda net, x: net.fc(x.flatten(1)), channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 16, 4)
        self.finish = finish

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        return self.finish(self, x)


def head_flatten(net, x):
    return net.fc(x.flatten(1))


def head_mean(net, x):
    return x.mean((2, 3))


def head_pool_cat(net, x):
    pooled = torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1)
    return net.drop(torch.flatten(pooled, 1))


def head_view(net, x):
    return net.fc(x.view(x.size(0), -1))


def head_image(net, x):
    return x


def head_pair(net, x):
    return net.fc(x.flatten(1)), {"features": x}


def head_dropout(net, x):
    return net.fc(net.drop(x).flatten(1))


def head_strides(net, x):
    return x.mean((2, 3)) * x.stride(1)


def head_flatten_in_part(net, x):
    return x.flatten(2)


class Blocks(nn.Sequential):
    """Activations in place, as torchvision writes them."""

    def __init__(self):
        def block(channels):
            conv = nn.Conv2d(channels, 8, 3, padding=1)
            return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(inplace=True))

        super().__init__(block(3), nn.Identity(), block(8), nn.AvgPool2d(8), nn.Flatten())

    @property
    def pool(self):
        return self[3]


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Net(head_flatten)

    def forward(self, x):
        x.sub_(0.5)
        return self.body(x)


class Optional(Net):
    def forward(self, x, features=False):
        x = F.relu(self.bn1(self.conv1(x)))
        return x.view(x.size(0), -1) if features else x.mean((2, 3))


class KeywordChild(nn.Module):
    """Calls a child in a form that is not the usual one."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Net(head_image), Viewer()

    def forward(self, x):
        return self.head(self.body(x), flat=True)


class Viewer(nn.Module):
    def forward(self, x, flat=False):
        return x.view(x.size(0), -1) if flat else x.mean((2, 3))


def memory_formats(net, x):
    """Call the net and return what order the pool's input was in."""
    seen = []
    hook = net.pool.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=CHANNELS_LAST))
    )
    output = net(x)
    hook.remove()
    return output, seen


@pytest.mark.parametrize("head", [head_flatten, head_mean, head_pool_cat])
@pytest.mark.parametrize("channels", [1, 3])
def test_hidden_where_nobody_sees_it(head, channels):
    net = Net(head, channels).eval()
    welded, x = tw.weld(net), torch.randn(2, channels, 8, 8)
    expected, stock_formats = memory_formats(net, x)
    output, formats = memory_formats(welded, x)
    assert (stock_formats, formats) == ([False], [True])
    torch.testing.assert_close(output, expected)
    assert output.stride() == expected.stride()


def test_what_changes_an_activation_of_its_own_does_not_see_it():
    net, x = Blocks().eval(), torch.randn(2, 3, 8, 8)
    welded = tw.weld(net)
    output, formats = memory_formats(welded, x)
    assert formats == [True]
    torch.testing.assert_close(output, net(x))


@pytest.mark.parametrize(
    "head", [head_view, head_image, head_pair, head_dropout, head_strides, head_flatten_in_part]
)
def test_left_alone_where_somebody_does(head):
    net = Net(head).eval()
    welded, x = tw.weld(net), torch.randn(2, 3, 8, 8)
    output, formats = memory_formats(welded, x)
    assert formats == [False]
    torch.testing.assert_close(output, net(x))
    assert any(row.converted for row in tw.report(welded))


def test_dropout_draws_what_it_drew():
    net = Net(head_dropout).train()
    welded, x = tw.weld(net), torch.randn(2, 3, 8, 8)
    torch.manual_seed(0)
    expected = net(x)
    torch.manual_seed(0)
    torch.testing.assert_close(welded(x), expected)


def test_gradients_are_the_stock_ones_in_the_order_of_their_parameters():
    net = Net(head_flatten)
    welded = tw.weld(net)
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    welded(x).square().sum().backward()
    for parameter, gradient in zip([x, *welded.parameters()], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-3, rtol=1e-3)
        assert parameter.grad.stride() == parameter.stride()


def test_a_part_called_alone_sees_what_it_is_given():
    net = nn.Sequential(Net(head_image), nn.Flatten()).eval()
    welded, x = tw.weld(net), torch.randn(2, 3, 8, 8)
    part, formats = memory_formats(welded[0], x)
    assert formats == [False]
    assert part.is_contiguous()
    _, formats = memory_formats(nn.Sequential(*welded)[0], x)
    assert formats == [False]


@pytest.mark.parametrize("inference", [False, True])
def test_copies_hide_it_too(inference):
    net = Net(head_flatten).eval()
    welded, x = tw.weld(net, inference=inference), torch.randn(2, 3, 8, 8)
    for twin in (copy.deepcopy(welded), pickle.loads(pickle.dumps(welded))):
        output, formats = memory_formats(twin, x)
        assert formats == [True]
        torch.testing.assert_close(output, net(x))


def test_a_trace_and_the_stock_form():
    net = Net(head_flatten).eval()
    welded, x = tw.weld(net), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        traced = torch.jit.trace(welded, x)
        torch.testing.assert_close(traced(x[:1]), net(x[:1]))
    assert memory_formats(tw.unweld(welded), x)[1] == [False]


class Calls(nn.Module):
    """Does something to its input before the rest."""

    def __init__(self, first):
        super().__init__()
        self.first, self.drop2d, self.body = first, nn.Dropout2d(), Net(head_flatten)

    def forward(self, x):
        return self.body(self.first(self, x))


IN_PLACE = nn.ReLU(inplace=True)


@pytest.mark.parametrize(
    "make",
    [
        ChangesItsInput,
        lambda: nn.Sequential(IN_PLACE, Net(head_flatten)),
        lambda: nn.Sequential(nn.Identity(), IN_PLACE, Net(head_flatten)),
        lambda: nn.Sequential(nn.Dropout2d(), nn.Sequential(IN_PLACE), Net(head_flatten)),
        lambda: Calls(lambda net, x: net.drop2d(x).mul_(2)),
        lambda: Calls(lambda net, x: F.relu(x.detach(), inplace=True)),
        lambda: Calls(lambda net, x: torch.relu_(input=x.float())),
        lambda: Calls(lambda net, x: x.contiguous().add_(1)),
    ],
)
def test_a_model_that_changes_its_input_changes_it(make):
    net = make().eval()
    x = torch.randn(2, 3, 8, 8)
    ours, theirs = x.clone(), x.clone()
    torch.testing.assert_close(tw.weld(net)(ours), net(theirs))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, x)


def views_written(net, x):
    y = x.flatten(1)
    y += 1
    return net.fc(y), x.mean((2, 3))


def contiguous_written(net, x):
    x.contiguous().mul_(2)
    return x.mean((2, 3))


class Last(Net):
    def __init__(self):
        super().__init__(lambda net, x: (net.last(x.flatten(1)), x.mean((2, 3))))
        self.last = nn.Sequential(nn.Hardtanh(-0.1, 0.1, inplace=True), nn.Linear(8 * 16, 4))


@pytest.mark.parametrize(
    "make", [lambda: Net(views_written), lambda: Net(contiguous_written), Last]
)
def test_an_activation_changed_through_a_view_is_changed(make):
    net = make().eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(tw.weld(net)(x), net(x))


def test_an_input_changed_through_a_view_is_changed():
    net = Calls(lambda net, x: x + x.flatten(1).add_(1).sum()).eval()
    x = torch.randn(2, 3, 8, 8)
    ours, theirs = x.clone(), x.clone()
    torch.testing.assert_close(tw.weld(net)(ours), net(theirs))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(lambda net, x: net.fc(F.dropout(x.flatten(1), 0.5, False, inplace=True))),
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(),
            nn.ReLU(inplace=True), nn.Linear(8 * 36, 4), nn.ReLU(inplace=True),
        ),
    ],
)  # fmt: skip
def test_a_view_that_alone_is_read_may_be_written(make):
    net = make().eval()
    assert seen_by(net) == ""
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(tw.weld(net)(x), net(x))


def test_a_call_of_another_form_sees_what_it_is_given():
    net = Optional().eval()
    welded, x = tw.weld(net), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(welded(x), net(x))
    torch.testing.assert_close(welded(x, True), net(x, True))
    torch.testing.assert_close(welded(x, features=True), net(x, features=True))


def test_a_child_called_in_another_form_is_not_trusted():
    net, x = KeywordChild().eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(tw.weld(net)(x), net(x))


def test_hooks_of_the_model_see_what_they_saw():
    net, x = Net(head_flatten).eval(), torch.randn(2, 3, 8, 8)
    net.pool.register_forward_hook(lambda module, args, y: y.view(y.size(0), -1).view_as(y))
    torch.testing.assert_close(tw.weld(net)(x), net(x))


def test_gradient_of_the_input_lies_as_the_input():
    net, x = Net(head_flatten).eval(), torch.randn(2, 3, 8, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    (gradient,) = torch.autograd.grad(tw.weld(net)(x).sum(), x)
    assert gradient.stride() == expected.stride()
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
