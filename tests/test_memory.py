"""Peak memory counts exactly the storages that a computation adds."""

from __future__ import annotations

import torch

from altprop.auditing.memory import peak_live_bytes

KIB = torch.zeros(256)  # one KiB of float32


def test_what_is_alive_together_adds_up_and_what_is_freed_does_not() -> None:
    def together() -> None:
        kept = [KIB + i for i in range(5)]
        assert len(kept) == 5

    def one_after_another() -> None:
        for i in range(5):
            _ = KIB + i

    assert peak_live_bytes(together) == 5 * 1024
    assert peak_live_bytes(one_after_another) == 2 * 1024  # the next is there before the last goes


def test_what_was_there_before_counts_nothing_nor_do_views_of_it() -> None:
    def views() -> None:
        KIB.view(16, 16).t()[2:].add_(0)

    assert peak_live_bytes(views) == 0


def test_a_view_keeps_its_whole_storage_alive() -> None:
    held = []

    def keep_one_element() -> None:
        held.append((KIB + 1)[:1])
        _ = KIB + 2

    assert peak_live_bytes(keep_one_element) == 2 * 1024


def test_activations_kept_for_the_backward_pass_grow_with_the_number_of_steps() -> None:
    weight = torch.ones(256, requires_grad=True)

    def peak(steps: int) -> int:
        def run() -> None:
            z = KIB
            for _ in range(steps):
                z = torch.sin(z * weight)  # keeps its product for the backward pass
            torch.autograd.grad(z.sum(), weight)

        return peak_live_bytes(run)

    first, second = peak(10), peak(20)
    assert 10 * 1024 <= second - first <= 20 * 1024
    assert peak(10) == first  # repeatable to the byte


def test_only_the_backward_pass_is_seen_when_only_it_is_run() -> None:
    weight = torch.ones(256, requires_grad=True)
    loss = (weight * KIB).sum()
    # the cotangent expanded from one number, and the gradient
    assert 1024 <= peak_live_bytes(lambda: torch.autograd.grad(loss, weight)) <= 2 * 1024


def test_storages_that_come_after_others_were_freed_count_as_much() -> None:
    def again_and_again() -> None:
        for _ in range(20):
            kept = [KIB + i for i in range(3)]
        kept = [KIB + i for i in range(5)]
        assert len(kept) == 5

    assert peak_live_bytes(again_and_again) == 8 * 1024  # three are there while five are made


def test_tensors_in_lists_and_by_keyword_are_seen() -> None:
    held = torch.empty(256)
    assert peak_live_bytes(lambda: torch.add(KIB, 1, out=held)) == 0  # it was there before
    assert peak_live_bytes(lambda: torch._foreach_add([KIB, KIB, KIB], 1)) == 3 * 1024


def test_what_has_no_storage_of_its_own_is_no_obstacle() -> None:
    assert peak_live_bytes(lambda: (KIB + 1).to_sparse().sum()) >= 1024
