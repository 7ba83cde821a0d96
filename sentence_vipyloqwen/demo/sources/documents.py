"""Vietnamese documents that we render: lines of words, invoices, receipts, forms, number plates and contract clauses.

Fonts: DejaVu Sans and Serif, which the PyPI package `matplotlib` ships (Bitstream Vera licence); both cover all of
Vietnamese, DejaVu Sans Mono does not. Words: `vietnamese.py` and the Vietnamese names of CLDR. People, firms, numbers
and amounts are made up.

Every page is small and its sides are multiples of 28 pixels, one vision token of Qwen2-VL for each 28x28: 8 tokens for
a line, at most 32 for a page. All answers are open: a line, an amount, a name, a date or a number of the eval split
never occurs in train.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sentence_vipyloqwen.demo.sources import Record, draw
from sentence_vipyloqwen.demo.sources.vietnamese import (
    BRAND_WORDS,
    BUSINESS_WORDS,
    COMPANY_KINDS,
    GIVEN_NAMES,
    MIDDLE_NAMES,
    SHOP_GOODS,
    SURNAMES,
)

LINE_SIZE = (224, 28)
PAGE_SIZES = {
    "invoice": (224, 112),
    "receipt": (168, 112),
    "form": (224, 112),
    "plate": (112, 56),
    "contract": (224, 112),
}

_QUESTIONS = {
    "total": ("Số tiền tổng cộng phải thanh toán là bao nhiêu?", "Tổng cộng bao nhiêu tiền?"),
    "tax": ("Tiền thuế là bao nhiêu?", "Thuế GTGT là bao nhiêu?"),
    "customer": ("Tên khách hàng là gì?", "Khách hàng là ai?"),
    "shop": ("Tên cửa hàng là gì?", "Biên lai của cửa hàng nào?"),
    "name": ("Họ và tên là gì?", "Người đăng ký tên là gì?"),
    "birthday": ("Ngày sinh là ngày nào?", "Người này sinh ngày nào?"),
    "phone": ("Số điện thoại là gì?", "Gọi số điện thoại nào?"),
    "plate": ("Biển số xe là gì?", "Xe mang biển số nào?"),
    "party_a": ("Bên A là ai?", "Tên bên A là gì?"),
    "party_b": ("Bên B là ai?", "Tên bên B là gì?"),
    "value": ("Giá trị hợp đồng là bao nhiêu?", "Hợp đồng trị giá bao nhiêu?"),
    "start": ("Hợp đồng có hiệu lực từ ngày nào?", "Hợp đồng bắt đầu ngày nào?"),
}
_CAPTIONS = {
    "invoice": "hóa đơn của {customer}, tổng cộng {total}",
    "receipt": "biên lai của {shop}, tổng cộng {total}",
    "form": "đơn đăng ký của {name}, sinh ngày {birthday}",
    "plate": "biển số xe {plate}",
    "contract": "hợp đồng giữa {party_a} và {party_b}, trị giá {value}",
}
_RIVALS = {"party_a": "party_b", "party_b": "party_a", "total": "tax", "tax": "total"}
_INKS = ((20, 20, 30), (25, 35, 90), (60, 30, 20), (15, 60, 40))
_PAPERS = ((255, 255, 255), (252, 250, 242), (244, 248, 252), (246, 246, 246))
_LINE_FACES = ("DejaVuSans", "DejaVuSans-Bold")
_LINE_INDENT = 8  # pixels at most
_LONGEST_LINE = 24  # characters
_SPECKS = 0.03  # of the pixels
_SPECK_CONTRAST = 30  # grey levels either way


# --- what they say ---


@dataclass(frozen=True)
class Line:
    """One to three Vietnamese words."""

    text: str

    @property
    def keys(self) -> frozenset[str]:
        """See `Drawable`."""
        return frozenset((self.text,))


@dataclass(frozen=True)
class Page:
    """A document's content: its domain and its fields, of which those that have a question are asked."""

    domain: str
    fields: tuple[tuple[str, str], ...]

    @cached_property
    def values(self) -> Mapping[str, str]:
        """Field name -> value."""
        return dict(self.fields)

    @property
    def asked(self) -> list[str]:
        """The fields that have a question."""
        return [name for name, _ in self.fields if name in _QUESTIONS]

    @cached_property
    def keys(self) -> frozenset[str]:
        """See `Drawable`: every answer."""
        return frozenset(self.values[name] for name in self.asked)

    @property
    def caption(self) -> str:
        """What the page is, in one line."""
        return _CAPTIONS[self.domain].format(**self.values)


def draw_lines(count: int, rng: random.Random, reserved: Set[str] = frozenset()) -> list[Line]:
    """Draw `count` different lines that fit into a picture."""
    return draw(lambda: _line(rng), count, reserved)


def _line(rng: random.Random) -> Line:
    while True:
        count = rng.choices((1, 2, 3), weights=(1, 4, 4))[0]
        text = " ".join(rng.choices(BUSINESS_WORDS, k=count))
        if len(text) <= _LONGEST_LINE:
            return Line(text)


def draw_pages(domain: str, count: int, rng: random.Random, reserved: Set[str] = frozenset()) -> list[Page]:
    """Draw the content of `count` different pages of one of the domains of `PAGE_SIZES`."""
    return draw(lambda: Page(domain, tuple(_FIELDS[domain](rng).items())), count, reserved)


def _invoice_fields(rng: random.Random) -> dict[str, str]:
    total = rng.randint(110, 9900) * 1100
    return {
        "number": f"{rng.randint(1, 9999999):07d}",
        "customer": _person(rng),
        "net": _dong(total * 10 // 11),
        "tax": _dong(total // 11),
        "total": _dong(total),
    }


def _receipt_fields(rng: random.Random) -> dict[str, str]:
    kind = rng.choice(list(SHOP_GOODS))
    first, second = rng.sample(SHOP_GOODS[kind], 2)
    prices = [rng.randint(20, 240) * 500 for _ in range(2)]
    return {
        "shop": f"{kind} {_brand(rng)}",
        "first": first,
        "first_price": _dong(prices[0]),
        "second": second,
        "second_price": _dong(prices[1]),
        "total": _dong(sum(prices)),
    }


def _form_fields(rng: random.Random) -> dict[str, str]:
    digits = f"{rng.choice((3, 5, 7, 8, 9))}{rng.randrange(10**8):08d}"
    return {
        "name": _person(rng),
        "birthday": _day(rng, 1950, 2007),
        "phone": f"0{digits[:3]} {digits[3:6]} {digits[6:]}",
    }


def _plate_fields(rng: random.Random) -> dict[str, str]:
    digits = f"{rng.randrange(10**5):05d}"
    plate = f"{rng.randint(11, 99)}{rng.choice('ABCDEFGHKLMNPSTUVXYZ')}-{digits[:3]}.{digits[3:]}"
    return {"plate": plate, "paint": rng.choice(("white", "white", "white", "blue", "yellow"))}


def _contract_fields(rng: random.Random) -> dict[str, str]:
    return {
        "kind": rng.choice(("thuê nhà", "mua bán", "dịch vụ", "vận chuyển", "xây dựng")),
        "party_a": f"{rng.choice(COMPANY_KINDS)} {_brand(rng)}",
        "party_b": _person(rng),
        "value": _dong(rng.randint(100, 99999) * 10_000),
        "start": _day(rng, 2010, 2029),
    }


_FIELDS: Mapping[str, Callable[[random.Random], dict[str, str]]] = {
    "invoice": _invoice_fields,
    "receipt": _receipt_fields,
    "form": _form_fields,
    "plate": _plate_fields,
    "contract": _contract_fields,
}


def _person(rng: random.Random) -> str:
    return f"{rng.choice(SURNAMES)} {rng.choice(MIDDLE_NAMES)} {rng.choice(GIVEN_NAMES)}"


def _brand(rng: random.Random) -> str:
    return " ".join(rng.sample(BRAND_WORDS, 2))


def _day(rng: random.Random, first_year: int, last_year: int) -> str:
    return f"{rng.randint(1, 28):02d}/{rng.randint(1, 12):02d}/{rng.randint(first_year, last_year)}"


def _dong(amount: int) -> str:
    return f"{amount:,} đ".replace(",", ".")


# --- what is asked about them ---


def line_record(line: Line, image: str) -> Record:
    """Read the line: task `ocr`, domain `line`. The prefix says what is wanted; no question is asked."""
    return {
        "task": "ocr",
        "anchor": {"image": [image]},
        "positive": line.text,
        "lang": "vi",
        "domain": "line",
    }


def page_records(
    page: Page, image: str, count: int, rng: random.Random, reserved: Set[str] = frozenset()
) -> list[Record]:
    """Ask for up to `count` fields of the page, each with a hard negative: like the answer, and not reserved."""
    asked = rng.sample(page.asked, min(count, len(page.asked)))
    return [
        {
            "task": "ocr",
            "anchor": {"image": [image], "text": rng.choice(_QUESTIONS[name])},
            "positive": page.values[name],
            "negative": _hard_negative(page, name, rng, reserved),
            "lang": "vi",
            "domain": page.domain,
        }
        for name in asked
    ]


def caption_record(page: Page, image: str) -> Record:
    """The page and its caption, without a prefix."""
    return {
        "task": "general",
        "anchor": {"image": [image]},
        "positive": page.caption,
        "lang": "vi",
        "domain": "document",
    }


def _hard_negative(page: Page, name: str, rng: random.Random, reserved: Set[str]) -> str:
    """The page's rival field if it has one, else the answer with a digit or its last word replaced."""
    negative = page.values.get(_RIVALS.get(name, "")) or _near(page.values[name], rng)
    while negative in reserved:
        negative = _near(page.values[name], rng)
    return negative


def _near(text: str, rng: random.Random) -> str:
    digits = [position for position, letter in enumerate(text) if letter.isdigit()]
    if digits:
        position = digits[-1] if "/" in text else rng.choice(digits[1:-3])  # a date stays a date, an amount round
        other = rng.choice([digit for digit in "0123456789" if digit != text[position]])
        return text[:position] + other + text[position + 1 :]
    *kept, last = text.split()
    others = BRAND_WORDS if last in BRAND_WORDS else GIVEN_NAMES
    return " ".join((*kept, rng.choice([word for word in others if word != last])))


# --- what they look like ---


@lru_cache(maxsize=64)
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's DejaVu fonts, such as `"DejaVuSans-Bold"`."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def fit(text: str, face: str, size: int, width: float) -> ImageFont.FreeTypeFont:
    """The face at `size`, or smaller by as much as the text needs to be no wider than `width`."""
    while size > 7 and font(face, size).getlength(text) > width:
        size -= 1
    return font(face, size)


def render_line(line: Line, rng: random.Random) -> Image.Image:
    """The line in a plain or a bold face, its size, indent, ink and paper varied a little.

    It stands on the middle of the height and begins near the left edge, as on a form: a tower that has read nothing yet
    takes several times as long to find letters that stray over its patches.
    """
    width, height = LINE_SIZE
    canvas = Image.new("RGB", LINE_SIZE, rng.choice(_PAPERS))
    chosen = fit(line.text, rng.choice(_LINE_FACES), rng.randint(15, 18), width - 8)
    room = width - 4 - chosen.getlength(line.text)
    at = (rng.uniform(4, max(4, min(room, _LINE_INDENT))), height / 2)
    ImageDraw.Draw(canvas).text(at, line.text, rng.choice(_INKS), chosen, anchor="lm")
    return _add_specks(canvas, rng)


def render_page(page: Page, rng: random.Random) -> Image.Image:
    """The page as its domain lays it out."""
    canvas = Image.new("RGB", PAGE_SIZES[page.domain], rng.choice(_PAPERS))
    _LAYOUTS[page.domain](_Pen(canvas, rng.choice(_INKS)), page.values)
    return _add_specks(canvas, rng)


def _add_specks(image: Image.Image, rng: random.Random) -> Image.Image:
    """Lighten or darken a few pixels, as a scanner does; few, so that the file stays small."""
    pixels, noise = np.asarray(image).astype(np.int16), np.random.default_rng(rng.getrandbits(32))
    rows, columns = (noise.integers(side, size=round(_SPECKS * pixels[..., 0].size)) for side in pixels.shape[:2])
    pixels[rows, columns] += noise.integers(-_SPECK_CONTRAST, _SPECK_CONTRAST + 1, (len(rows), 1), dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class _Pen:
    """Draws on one page with one ink; texts stand on the middle of the height that they are given."""

    def __init__(self, canvas: Image.Image, ink: tuple[int, int, int]) -> None:
        self.width, self.height = canvas.size
        self.ink = ink
        self.soft = tuple((level + 2 * 210) // 3 for level in ink)
        self._draw = ImageDraw.Draw(canvas)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int,
        width: float,
        *,
        bold: bool = False,
        anchor: str = "lm",
        face: str = "",
    ) -> None:
        face = face or ("DejaVuSans-Bold" if bold else "DejaVuSans")
        self._draw.text((x, y), text, self.ink, fit(text, face, size, width), anchor=anchor)

    def title(self, y: float, text: str, size: int, face: str = "DejaVuSans-Bold") -> None:
        self.text(self.width / 2, y, text, size, self.width - 12, anchor="mm", face=face)

    def row(self, y: float, label: str, value: str, size: int = 12, *, bold: bool = False) -> None:
        """A label at the left, its value flush right."""
        self.text(8, y, label, size - 1, self.width * 0.45)
        self.text(self.width - 8, y, value, size, self.width * 0.6, bold=bold, anchor="rm")

    def rule(self, y: float, *, dashed: bool = False) -> None:
        step = 6 if dashed else self.width
        for x in range(6, self.width - 6, step):
            self._draw.line((x, y, min(x + step - 3, self.width - 7), y), fill=self.soft)

    def box(self, x: float, y: float, right: float, bottom: float, fill: tuple[int, int, int] | None = None) -> None:
        self._draw.rectangle((x, y, right, bottom), fill=fill, outline=self.soft)

    def frame(self, fill: tuple[int, int, int], ink: tuple[int, int, int]) -> None:
        """A plate: the whole page painted, with a rounded border."""
        self.ink = ink
        self._draw.rectangle((0, 0, self.width, self.height), fill=(120, 125, 130))
        self._draw.rounded_rectangle((2, 2, self.width - 3, self.height - 3), 6, fill=fill, outline=ink, width=2)


def _lay_out_invoice(pen: _Pen, values: Mapping[str, str]) -> None:
    pen.text(8, 12, "HÓA ĐƠN", 14, 100, bold=True)
    pen.text(pen.width - 8, 12, f"Số {values['number']}", 10, 100, anchor="rm")
    pen.rule(22)
    pen.row(33, "Khách hàng", values["customer"])
    pen.box(5, 43, pen.width - 6, 106)
    pen.row(53, "Tiền hàng", values["net"])
    pen.rule(63)
    pen.row(73, "Thuế GTGT 10%", values["tax"])
    pen.box(5, 84, pen.width - 6, 106, fill=(226, 232, 240))
    pen.row(95, "TỔNG CỘNG", values["total"], 14, bold=True)


def _lay_out_receipt(pen: _Pen, values: Mapping[str, str]) -> None:
    pen.title(13, values["shop"], 13)
    pen.title(28, "BIÊN LAI", 10, "DejaVuSans")
    pen.rule(37, dashed=True)
    pen.row(48, values["first"], values["first_price"], 11)
    pen.row(64, values["second"], values["second_price"], 11)
    pen.rule(76, dashed=True)
    pen.row(91, "Tổng", values["total"], 15, bold=True)
    pen.rule(105, dashed=True)


def _lay_out_form(pen: _Pen, values: Mapping[str, str]) -> None:
    pen.title(13, "ĐƠN ĐĂNG KÝ", 14)
    for y, label, name in ((37, "Họ và tên", "name"), (64, "Ngày sinh", "birthday"), (91, "Điện thoại", "phone")):
        pen.text(8, y, label, 11, 66)
        pen.box(76, y - 11, pen.width - 7, y + 11, fill=(255, 255, 255))
        pen.text(82, y, values[name], 13, pen.width - 96)


def _lay_out_plate(pen: _Pen, values: Mapping[str, str]) -> None:
    fill, ink = {
        "white": ((250, 250, 248), (15, 15, 20)),
        "blue": ((28, 66, 150), (250, 250, 250)),
        "yellow": ((246, 196, 40), (15, 15, 20)),
    }[values["paint"]]
    pen.frame(fill, ink)
    area, number = values["plate"].split("-")
    pen.title(17, area, 20)
    pen.title(38, number, 22)


def _lay_out_contract(pen: _Pen, values: Mapping[str, str]) -> None:
    pen.title(12, f"HỢP ĐỒNG {values['kind'].upper()}", 13, "DejaVuSerif-Bold")
    pen.rule(22)
    rows = (
        (33, "Bên A:", values["party_a"]),
        (53, "Bên B:", values["party_b"]),
        (75, "Giá trị:", values["value"]),
        (95, "Hiệu lực từ ngày:", values["start"]),
    )
    for y, label, value in rows:
        left = 8 + font("DejaVuSerif", 11).getlength(label) + 5
        pen.text(8, y, label, 11, 120, face="DejaVuSerif")
        pen.text(left, y, value, 12, pen.width - left - 6, face="DejaVuSerif-Bold")
    pen.rule(64)


_LAYOUTS: Mapping[str, Callable[[_Pen, Mapping[str, str]], None]] = {
    "invoice": _lay_out_invoice,
    "receipt": _lay_out_receipt,
    "form": _lay_out_form,
    "plate": _lay_out_plate,
    "contract": _lay_out_contract,
}
