"""Wan's VAE against diffusers' own: Wan 2.2's patches and shortcuts, tiles that change no pixel, chunks by memory."""

import copy

import pytest
import torch

from afd_fast.errors import ConfigError
from afd_fast.students.wan.vae import DecoderStream, Tile, WanDecoder


def wan_2_2(**sizes):
    """Wan2.2-TI2V-5B's architecture (48 channels, patches of 2, residual blocks), small and with random weights."""
    from diffusers import AutoencoderKLWan

    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = dict(
            base_dim=2, decoder_base_dim=4, z_dim=48, num_res_blocks=1, in_channels=12, out_channels=12, patch_size=2,
            is_residual=True, scale_factor_spatial=16, latents_mean=torch.randn(48, generator=g).tolist(),
            latents_std=(torch.rand(48, generator=g) + 0.5).tolist(),
        )  # fmt: skip
        return AutoencoderKLWan(**settings | sizes).eval()


@pytest.fixture(scope="module")
def patched():
    return wan_2_2()


@pytest.fixture(scope="module")
def plain():
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4, num_res_blocks=1).eval()


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def official(vae, latents):
    """diffusers' pixels in [0, 1], each sample alone."""
    shape = (1, -1, 1, 1, 1)
    z = latents * torch.tensor(vae.config.latents_std).view(shape) + torch.tensor(vae.config.latents_mean).view(shape)
    with torch.no_grad():
        return torch.cat([vae.decode(one[None]).sample for one in z]) / 2 + 0.5


class TestWan22:
    @pytest.mark.parametrize("chunk", [1, 3])
    def test_decodes_as_diffusers(self, patched, chunk):
        z = normal(2, 48, 5, 2, 3)
        pixels = WanDecoder(patched, chunk=chunk)(z)
        assert pixels.shape == (2, 3, 17, 32, 48) and pixels.std() > 0.1
        assert (pixels - official(patched, z)).abs().max() < 5e-6

    def test_a_stream_of_chunks(self, patched):
        z = normal(1, 48, 5, 2, 4)
        stream = WanDecoder(patched).stream()
        pixels = torch.cat([stream(part) for part in z.split((2, 3), 2)], 2)
        assert (pixels - official(patched, z)).abs().max() < 5e-6

    def test_the_plain_decoder_with_patches(self):
        """patch_size alone, without the residual blocks."""
        vae, z = wan_2_2(is_residual=False), normal(1, 48, 3, 2, 4)
        assert (WanDecoder(vae)(z) - official(vae, z)).abs().max() < 5e-6

    def test_encodes_as_diffusers(self, patched):
        videos = torch.rand(1, 3, 5, 32, 64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            mode = patched.encode(videos * 2 - 1).latent_dist.mode()
        shape = (1, -1, 1, 1, 1)
        expected = (mode - torch.tensor(patched.config.latents_mean).view(shape)) / torch.tensor(
            patched.config.latents_std
        ).view(shape)
        assert torch.allclose(WanDecoder(patched).encode(videos), expected, atol=1e-6)
        for size in ((5, 32, 56), (5, 40, 64), (4, 32, 64)):  # 56 and 40 are multiples of 8, not of 16
            with pytest.raises(ValueError, match="16 H, 16 W"):
                WanDecoder(patched).encode(torch.rand(1, 3, *size))

    def test_statistics_of_another_vae_are_refused(self, patched):
        with pytest.raises(ConfigError, match="48 channels, its config.json 16 latents_mean"):
            WanDecoder(wan_2_2(latents_mean=[0.0] * 16))


class TestTiles:
    """Every pixel of a tiled video is that of the undivided one, in float64 bit for bit."""

    @pytest.mark.parametrize("name,size", [("plain", (1, 22)), ("plain", (6, 3)), ("patched", (22, 1))])
    def test_equal(self, name, size, request):
        """Tiles of 4 x 4 latent pixels; convolutions reach 9."""
        vae = copy.deepcopy(request.getfixturevalue(name)).double()
        z = normal(1, vae.config.z_dim, 2, *size).double()
        whole, side = WanDecoder(vae)(z), 4 * WanDecoder(vae).scale
        decoder = WanDecoder(vae, tile=side)
        assert len(decoder.tiles(*size)) == -(-size[0] // 4) * -(-size[1] // 4) > 1
        assert torch.equal(decoder(z), whole)
        narrow = WanDecoder(copy.deepcopy(vae).float(), tile=side)(z)
        assert (narrow - whole).abs().max() < 2e-5

    def test_two_residual_blocks_and_samples(self):
        """Wan's own depth, whose convolutions reach 13 latent pixels; two samples."""
        from diffusers import AutoencoderKLWan

        torch.manual_seed(3)
        vae = AutoencoderKLWan(base_dim=2, num_res_blocks=2).eval().double()
        z = normal(2, 16, 1, 24, 1).double()
        assert torch.equal(WanDecoder(vae, tile=32)(z), WanDecoder(vae)(z))

    def test_a_stream(self, plain):
        vae, z = copy.deepcopy(plain).double(), normal(1, 16, 3, 3, 5).double()
        stream = WanDecoder(vae, tile=32).stream()
        pixels = torch.cat([stream(part) for part in z.split((2, 1), 2)], 2)
        assert torch.equal(pixels, WanDecoder(vae)(z))

    def test_gradient(self, plain):
        vae, z = copy.deepcopy(plain).double(), normal(1, 16, 2, 4, 6).double().requires_grad_()
        slopes = [torch.autograd.grad(WanDecoder(vae, tile=t)(z).square().sum(), z)[0] for t in (None, 16)]
        assert (slopes[0] - slopes[1]).abs().max() < 1e-5 * slopes[0].abs().max()

    def test_enable_tiling(self, plain):
        """diffusers' switch tiles here too, into its strides, and only frames above its least size."""
        vae = copy.deepcopy(plain).double()
        z = normal(1, 16, 1, 6, 8).double()
        whole = WanDecoder(vae)(z)
        vae.enable_tiling(40, 40, 24, 32)
        decoder = WanDecoder(vae)
        assert decoder.tiles(6, 8) == [Tile(0, 3, 0, 4), Tile(0, 3, 4, 8), Tile(3, 6, 0, 4), Tile(3, 6, 4, 8)]
        assert len(decoder.tiles(5, 5)) == 1
        assert torch.equal(decoder(z), whole)

    def test_state_of_one_tile_at_a_time(self, plain):
        """A whole video keeps the earlier frames of one tile, a stream those of all."""
        z, kept = normal(1, 16, 2, 2, 6), []
        for whole in (True, False):
            stream = DecoderStream(WanDecoder(plain, tile=16), whole=whole)
            most, norm = 0, stream._norm_causal

            def counted(*args, stream=stream, norm=norm):
                nonlocal most
                out = norm(*args)
                most = max(most, len({tile for tile, _ in stream.past if tile is not None}))
                return out

            stream._norm_causal = counted
            stream(z)
            kept.append(most)
        assert kept == [1, 3]

    @pytest.mark.parametrize("bad", [0, 4, 12])
    def test_refused(self, plain, bad):
        with pytest.raises(ValueError, match=f"tile={bad}, expected a multiple of 8"):
            WanDecoder(plain, tile=bad)


def test_chunks_by_memory(plain):
    decoder, frame = WanDecoder(plain), Tile(0, 60, 0, 104)
    each = 6 * 4 * 4 * 480 * 832 * 4  # tensors, frames of video, channels, pixels, bytes
    assert [decoder.chunk_for(1, frame, n) for n in (0, each - 1, each, 2 * each, 3 * each, 9 * each)] == [
        1,
        1,
        1,
        2,
        3,
        3,
    ]
    assert decoder.chunk_for(2, frame, 2 * each) == 1
    assert decoder.stream()._sizes(8, frame) == [1, 3, 3, 1]  # a CPU's memory is not asked
    assert WanDecoder(plain, chunk=7).stream()._sizes(8, frame) == [1, 7]
