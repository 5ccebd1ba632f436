"""One layer of connections.

B, T: batch and sequence length (any leading shape); D: model width; S: number of sources; C: number of ways.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._checks import check_flag, check_integer, check_real
from .norm import RMSNorm, as_stream_norms, autocast_dtype, check_norms, plain_parameters
from .options import WAYS, ConnectionOptions, check_ways

__all__ = ["DepthAggregation"]


class DepthAggregation(nn.Module):
    """Depth-wise aggregation DA_i: mixes the hidden states of all layers so far, with weights made from the newest.

    ``A = GELU(RMSNorm(X_i) W1^T) W2^T + prior`` and ``Y_c = sum_j A[..., c, j] X_j`` (Eq. 5 to 8). A fresh
    layer passes X_i on: every Y_c is X_i (but for a pre-norm without post-norm, where some are the normed X_i, and a
    cap of at most 1). A subclass that overrides :meth:`connection_weights` mixes with weights of
    its own.

    Args:
        dim: model width D.
        sources: number of hidden states S that are mixed, the newest last.
        ways: a part of ``"qkvr"``: four streams are returned, one left out being X_i itself. Or a number C: C streams
            are returned, the last one counting as the residual way.
        options: the options of the connections; those of a whole stack (``dense``, ``multiway``, ``ways``, strides,
            window, ``expand_last``, ``flush_interval``, ``residual_dtype``) have no effect here. None: the defaults,
            and ``round64=False``.
        expand: factor of the generator's hidden width K = C * S * expand.
        eps: added to the mean square in the norms.
        prior: False: the module has no prior of its own; every call gets one.
        fields: single fields of :class:`ConnectionOptions`, in place of those in ``options``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        dim: int,
        sources: int,
        ways: str | int = WAYS,
        *,
        options: ConnectionOptions | None = None,
        expand: int = 1,
        eps: float = 1e-6,
        prior: bool = True,
        device: Any = None,
        dtype: Any = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.options = options = ConnectionOptions.of(options, fields, round64=False)
        self.dim = check_integer("dim", dim)
        self.sources = check_integer("sources", sources)
        counted = isinstance(ways, numbers.Integral)
        self.ways = check_integer("ways", ways) if counted else check_ways("ways", ways)
        self.num_ways = self.ways if counted else len(ways)
        self.eps = check_real("eps", eps, 0.0, 1.0)
        self.dynamic, self.cap, self.gelu_approximate = options.dynamic, options.cap, options.gelu_approximate
        self.prior = (
            nn.Parameter(torch.empty(self.num_ways, self.sources, **factory)) if check_flag("prior", prior) else None
        )
        self.norm = self.pre_norm = self.post_norms = None
        if self.dynamic:
            width = self.num_ways * self.sources * check_integer("expand", expand)
            width = (width // 64 + 1) * 64 if options.round64 else width
            self.w1 = nn.Linear(dim, width, bias=False, **factory)
            self.w2 = nn.Linear(width, self.num_ways * self.sources, bias=False, **factory)
            self.norm = RMSNorm(dim, eps, **factory) if options.pre_norm else None
        if options.pre_norm:
            self.pre_norm = RMSNorm(dim, eps, **factory)
        if options.post_norm != "none":
            residual = self.num_ways - 1 if counted else self.ways.find("r")
            self.post_norms = nn.ModuleList(
                RMSNorm(dim, eps, init=1e-3, **factory)
                if options.post_norm == "all" or way == residual
                else nn.Identity()
                for way in range(self.num_ways)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Passes X_i on: W1 ~ Normal(variance 1/D), W2 = 0, prior 1 on X_i (with a cap what its bound makes 1).

        With ``post_norm`` the prior is 0.
        """
        if self.dynamic:
            nn.init.normal_(self.w1.weight, std=self.dim**-0.5)
            nn.init.zeros_(self.w2.weight)
        for norm in (self.norm, self.pre_norm, *(self.post_norms or ())):
            if isinstance(norm, RMSNorm):
                norm.reset_parameters()
        if self.prior is not None:
            self.reset_prior(self.prior)

    @torch.no_grad()
    def reset_prior(self, prior: Tensor) -> None:
        """Fills a prior [C, S] for this layer with its initial values, in place."""
        prior.zero_()
        if self.post_norms is None:
            # The bounded weight, not the prior, has to be one; a cap of at most 1 cannot reach it.
            one = torch.tensor(1.0, dtype=torch.float64, device="cpu")  # also where the parameters are made on meta
            prior[:, -1] = self.cap * torch.atanh(one / self.cap).item() if self.cap and self.cap > 1 else 1.0

    def forward(
        self,
        hiddens: Sequence[Tensor],
        prior: Tensor | None = None,
        stream_norms: Sequence[nn.Module | None] | None = None,
        deferral: ops.Deferral | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Mixes hidden states.

        Args:
            hiddens: the S sources, each [..., D], of one shape, dtype and device; the newest, X_i, is the last.
            prior: [C, S], in place of the module's own.
            stream_norms: norms of the streams that are returned, None for a stream that stays as it is. On CUDA they
                cost no pass of their own (:func:`muddformer.ops.depth_aggregate_norm_chained`).
            deferral: this layer's of :func:`muddformer.ops.defer_gradients`, or None.

        Returns:
            ``(streams, hiddens)``: the streams, each [..., D], and the sources to give to later layers in place of
            those that came (their gradients are chained, and with ``pre_norm`` the newest is now the normed one).

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if type(hiddens) is not list and (isinstance(hiddens, Tensor | str) or not isinstance(hiddens, Sequence)):
            raise TypeError(f"hiddens must be a list of tensors, got a value of type {type(hiddens).__name__}")
        if len(hiddens) != self.sources:
            raise ValueError(f"hiddens must be {self.sources} tensors, got {len(hiddens)}")
        # Streams are the ways themselves, but for ways that are left out.
        ways = self.ways if isinstance(self.ways, str) and self.ways != WAYS else None
        count = self.num_ways if ways is None else len(WAYS)
        norms = check_norms("stream_norms", stream_norms, count)
        prior = self.prior if prior is None else prior
        if prior is None:
            raise ValueError("prior must be given to a DepthAggregation that was made with prior=False")
        way_norms = norms if ways is None else [norms[WAYS.index(way)] for way in ways]
        newest = hiddens[-1]
        if not isinstance(newest, Tensor):
            raise TypeError(f"hiddens[-1] must be a tensor, got a value of type {type(newest).__name__}")
        if not isinstance(prior, Tensor):
            raise TypeError(f"prior must be a tensor, got a value of type {type(prior).__name__}")
        if newest.shape[-1:] != (self.dim,):
            raise ValueError(f"hiddens must have shape [..., dim] with dim={self.dim}, got {list(newest.shape)}")
        if prior.shape != (self.num_ways, self.sources):
            raise ValueError(f"prior must have shape {[self.num_ways, self.sources]}, got {list(prior.shape)}")
        step = self._takes_one_step(newest)
        # A trace is the same with and without gradients (muddformer/_tracing.py), for which norms are called.
        fuses = ops.fuses_norms(newest, self.sources, self.num_ways) and not torch.jit.is_tracing()
        kinds = as_stream_norms(way_norms, newest) if step or fuses else None
        if step and kinds is not None:
            # The hidden states that are handed on are in autocast's dtype: each is cast once.
            dtype = autocast_dtype(newest)
            hiddens = hiddens if dtype is None else [x.to(dtype) for x in hiddens]
            newest = hiddens[-1]
            mixed = self._step(hiddens, prior, kinds)
        else:
            mixed, hiddens, newest = self._mix(hiddens, prior, way_norms, kinds if fuses else None, deferral)
        if ways is not None:
            by_way = dict(zip(ways, mixed, strict=True))
            left_out = [way for way in WAYS if way not in by_way]
            for way in left_out:
                norm = norms[WAYS.index(way)]
                by_way[way] = newest if norm is None else norm(newest)
            mixed = [by_way[way] for way in WAYS]
        return list(mixed), list(hiddens)

    def connection_weights(self, x: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """The weights A with which hidden states are mixed.

        A subclass may override it. Its gradients are ordinary ones; that of ``x`` joins the others of ``x`` without a
        pass of its own if it hands on what an operator such as :func:`muddformer.ops.connection_weights_chained` does.

        Args:
            x: the newest hidden state X_i [..., D], before any pre-norm.
            prior: [C, S].

        Returns:
            ``(weights, x)``: weights [..., C, S] in the dtype of ``x`` (under autocast any), and ``x`` to be used from
            here on.
        """
        if self.dynamic:
            generator = self._generator(x)
            if generator is None:
                return self._call_generator(x, prior), x
            w1, w2, scale = generator
            return ops.connection_weights_chained(
                x, w1, w2, prior, scale=scale, eps=self.eps, gelu_approximate=self.gelu_approximate, cap=self.cap
            )
        return self._bounded(prior).to(x.dtype).expand(*x.shape[:-1], *prior.shape), x

    def _call_generator(self, x: Tensor, prior: Tensor) -> Tensor:
        normed = F.rms_norm(x, x.shape[-1:], eps=self.eps) if self.norm is None else self.norm(x)
        a = self.w2(F.gelu(self.w1(normed), approximate=self.gelu_approximate)).unflatten(-1, prior.shape)
        a = a + prior.to(a.dtype)
        return self._bounded(a)

    def _bounded(self, a: Tensor) -> Tensor:
        if self.cap is None:
            return a
        if self.cap > torch.finfo(a.dtype).max:
            raise ValueError(f"cap must be at most {torch.finfo(a.dtype).max:g} for {a.dtype}, got {self.cap!r}")
        return self.cap * torch.tanh(a / self.cap)

    def _generator(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """W1, W2 and the norm's weight, if the operators may read them instead of calling the modules."""
        modules = self._modules  # by getattr it takes long
        w1, w2 = plain_parameters(modules["w1"], x, nn.Linear), plain_parameters(modules["w2"], x, nn.Linear)
        if w1 is None or w2 is None or w1[1] is not None or w2[1] is not None:
            return None
        norm = modules.get("norm")
        if norm is None:
            return w1[0], w2[0], None
        norm = plain_parameters(norm, x, RMSNorm)
        return None if norm is None else (w1[0], w2[0], norm[0])

    def _mix(
        self,
        hiddens: Sequence[Tensor],
        prior: Tensor,
        norms: Sequence[nn.Module | None],
        kinds: ops.StreamNorms | None,
        deferral: ops.Deferral | None,
    ) -> tuple[list[Tensor], Sequence[Tensor], Tensor]:
        """The streams of the ways, the hidden states to be used from here on, and X_i likewise."""
        weights, newest = self.connection_weights(hiddens[-1], prior)
        fused = None if kinds is None else self._fused_norms(kinds, newest)
        if fused is not None:
            hiddens = [*hiddens[:-1], newest]
            mixed, hiddens = ops.depth_aggregate_norm_chained(hiddens, weights, fused, deferral=deferral)
            return mixed, hiddens, newest if self.pre_norm is not None else hiddens[-1]
        normed = newest if self.pre_norm is None else self.pre_norm(newest)
        mixed, hiddens = ops.depth_aggregate_chained([*hiddens[:-1], normed], weights, deferral)
        if self.pre_norm is None:
            newest = hiddens[-1]
        if self.post_norms is not None:
            mixed = [newest + norm(y) for norm, y in zip(self.post_norms, mixed, strict=True)]
        return [y if norm is None else norm(y) for norm, y in zip(norms, mixed, strict=True)], hiddens, newest

    def _takes_one_step(self, newest: Tensor) -> bool:
        """Whether this is decoding: a few tokens on CUDA, no gradients, and what one kernel can do."""
        if torch.is_grad_enabled() or self.pre_norm is not None or self.post_norms is not None:
            return False
        if type(self).connection_weights is not DepthAggregation.connection_weights:
            return False
        if self.dynamic and self._generator(newest) is None:
            return False
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # the number of tokens is to stay open
            return False
        return ops.fuses_step(newest)

    def _step(self, hiddens: Sequence[Tensor], prior: Tensor, norms: ops.StreamNorms) -> list[Tensor]:
        return ops.depth_aggregation_step(
            hiddens,
            self.w1.weight if self.dynamic else None,
            self.w2.weight if self.dynamic else None,
            prior,
            eps=self.eps,
            gelu_approximate=self.gelu_approximate,
            cap=self.cap,
            norm_weights=norms.weights,
            norm_biases=norms.biases,
            norm=norms.kind,
            norm_eps=norms.eps,
        )

    def _fused_norms(self, norms: ops.StreamNorms, x: Tensor) -> ops.StreamNorms | None:
        """The norms that the aggregation makes itself; None where it cannot make all of them, or has none to make."""
        if self.pre_norm is None and self.post_norms is None:
            return None if norms.kind == "none" else norms
        post = None
        if self.post_norms is not None:
            kept = [i for i, norm in enumerate(self.post_norms) if type(norm) is not nn.Identity]
            if any(i != self.num_ways - 1 or norms.weights[i] is not None for i in kept):
                return None
            post = self.post_norms[-1] if kept else None
        if norms.kind == "none":
            norms = norms._replace(kind="rms", eps=self.eps)
        parameters = [*norms.weights, *norms.biases]
        for own in (self.pre_norm, post):
            if own is None:
                continue
            kinds = as_stream_norms([own], x)
            if kinds is None or (kinds.kind, kinds.eps) != ("rms", norms.eps):
                return None
            parameters.append(own.weight)
        # The operator takes parameters of one dtype; autocast sees to that itself.
        if len({p.dtype for p in parameters if p is not None}) > 1 and autocast_dtype(x) is None:
            return None
        pre_weight, post_weight = (None if own is None else own.weight for own in (self.pre_norm, post))
        return norms._replace(add_newest=self.post_norms is not None, pre_weight=pre_weight, post_weight=post_weight)

    def extra_repr(self) -> str:
        text = f"{self.dim}, sources={self.sources}, ways={self.ways!r}, dynamic={self.dynamic}, eps={self.eps:g}"
        text += f", gelu_approximate={self.gelu_approximate!r}" if self.dynamic else ""
        return text if self.cap is None else f"{text}, cap={self.cap:g}"
