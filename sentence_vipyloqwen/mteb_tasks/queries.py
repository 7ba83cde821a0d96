"""What people ask for a Vietnamese document: several ways of asking, and five ways to write each.

An asking names what tells the page from others, such as a phone number, or a customer and an amount, as the page shows
it. Its words are Vietnamese, English or Chinese, and never those of the caption that the demo trains on; a Vietnamese
one is also written as many type it, without diacritics, and with the errors of those who type Vietnamese.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from sentence_vipyloqwen.demo.sources.documents import Page
from sentence_vipyloqwen.mteb_tasks.typing_errors import add_typing_errors, strip_diacritics

VIETNAMESE, PLAIN, TYPOS, ENGLISH, CHINESE = "vietnamese", "no_diacritics", "typing_errors", "english", "chinese"


@dataclass(frozen=True)
class Asking:
    """One way of asking for a kind of page: the same question in each language, with fields of the page in braces."""

    vietnamese: str
    english: str
    chinese: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that it names."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.vietnamese) if name)

    def ask(self, page: Page, language: str) -> str:
        """The question for a page."""
        templates = {VIETNAMESE: self.vietnamese, ENGLISH: self.english, CHINESE: self.chinese}
        words = {name: _TRANSLATED.get(name, {}).get(value, {}) for name, value in page.fields}
        return templates[language].format(**{name: words[name].get(language, value) for name, value in page.fields})


ASKINGS: Mapping[str, tuple[Asking, ...]] = {
    "invoice": (
        Asking("tìm giúp tôi hóa đơn số {number}", "find me invoice number {number}", "帮我找编号{number}的发票"),
        Asking("hóa đơn xuất cho {customer}", "the invoice made out to {customer}", "开给{customer}的发票"),
        Asking(
            "{customer} mua hàng hết {total}, cho tôi xem hóa đơn",
            "{customer} bought goods for {total}, show me the invoice",
            "{customer}买货花了{total}，给我看看发票",
        ),
        Asking("hóa đơn nào có tiền thuế là {tax}?", "which invoice has a tax of {tax}?", "哪张发票的税额是{tax}？"),
        Asking(
            "hóa đơn nào khách phải trả {total}?",
            "on which invoice does the customer have to pay {total}?",
            "哪张发票上客户要付{total}？",
        ),
    ),
    "receipt": (
        Asking("phiếu tính tiền ở {shop}", "the till slip from {shop}", "{shop}的小票"),
        Asking(
            "hôm trước tôi trả {total} ở {shop}, cần lại biên lai",
            "I paid {total} at {shop} the other day and need the receipt again",
            "前几天我在{shop}付了{total}，需要那张收据",
        ),
        Asking(
            "biên lai có {first} và {second}, trả hết {total}",
            "the receipt with {first} and {second}, {total} paid",
            "有{first}和{second}、一共付了{total}的收据",
        ),
        Asking(
            "biên lai nào ghi số tiền phải trả là {total}?",
            "which receipt says that {total} is to be paid?",
            "哪张收据写着应付{total}？",
        ),
    ),
    "form": (
        Asking("tờ đơn do {name} điền", "the form filled in by {name}", "{name}填的表"),
        Asking(
            "đơn nào ghi số điện thoại {phone}?",
            "which form gives the phone number {phone}?",
            "哪份表上写的电话是{phone}？",
        ),
        Asking(
            "đơn nào ghi ngày sinh {birthday}?",
            "which form gives the date of birth {birthday}?",
            "哪份表上写的出生日期是{birthday}？",
        ),
        Asking(
            "cần tìm phiếu đăng ký có tên {name}, số liên lạc {phone}",
            "looking for the registration with the name {name} and the contact number {phone}",
            "要找姓名为{name}、联系电话为{phone}的登记表",
        ),
        Asking(
            "người đăng ký tên là {name}, ngày sinh {birthday}, tìm giúp tờ đơn",
            "the applicant is called {name}, date of birth {birthday}, please find the form",
            "登记人叫{name}，出生日期{birthday}，请找一下这份表",
        ),
    ),
    "plate": (
        Asking("tìm ảnh chiếc xe {plate}", "find the picture of the vehicle {plate}", "找{plate}那辆车的照片"),
        Asking("xe nào mang biển {plate}?", "which vehicle bears the plate {plate}?", "哪辆车挂的是{plate}的牌照？"),
        Asking("xe đeo biển {paint} {plate}", "the vehicle with the {paint} plate {plate}", "挂{paint}牌的车{plate}"),
    ),
    "contract": (
        Asking(
            "{party_b} ký hợp đồng {kind} với bên nào?",
            "with which party did {party_b} sign a {kind} contract?",
            "{party_b}跟哪一方签了{kind}合同？",
        ),
        Asking(
            "văn bản {party_a} ký với {party_b}",
            "the document that {party_a} signed with {party_b}",
            "{party_a}跟{party_b}签的文件",
        ),
        Asking(
            "hợp đồng {kind} có hiệu lực từ {start}",
            "the {kind} contract in force from {start}",
            "自{start}起生效的{kind}合同",
        ),
        Asking(
            "hợp đồng nào có giá trị {value}?", "which contract has a value of {value}?", "哪份合同的金额是{value}？"
        ),
        Asking(
            "hợp đồng {kind} của {party_a}, số tiền {value}",
            "the {kind} contract of {party_a} for {value}",
            "{party_a}的{kind}合同，金额{value}",
        ),
    ),
}
"""Kind of page -> the ways of asking for one."""

_TRANSLATED: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "kind": {
        "thuê nhà": {ENGLISH: "house rental", CHINESE: "房屋租赁"},
        "mua bán": {ENGLISH: "sales", CHINESE: "买卖"},
        "dịch vụ": {ENGLISH: "service", CHINESE: "服务"},
        "vận chuyển": {ENGLISH: "transport", CHINESE: "运输"},
        "xây dựng": {ENGLISH: "construction", CHINESE: "建筑"},
    },
    "paint": {
        "white": {VIETNAMESE: "trắng", ENGLISH: "white", CHINESE: "白"},
        "blue": {VIETNAMESE: "xanh", ENGLISH: "blue", CHINESE: "蓝"},
        "yellow": {VIETNAMESE: "vàng", ENGLISH: "yellow", CHINESE: "黄"},
    },
}
"""Field -> value -> language -> word, of the fields that are words of the question: all others stay as on the page."""


def clear_askings(pages: Sequence[Page]) -> list[list[Asking]]:
    """For each page, the ways of asking that mean it and no other of the pages, which are of one kind.

    Values that differ in nothing but diacritics or case count as equal, as one way of writing leaves those out.
    """
    clear: list[list[Asking]] = [[] for _ in pages]
    for asking in ASKINGS[pages[0].domain]:
        named = [tuple(strip_diacritics(page.values[name]).lower() for name in asking.fields) for page in pages]
        often = Counter(named)
        for place, values in enumerate(named):
            if often[values] == 1:
                clear[place].append(asking)
    return clear


def write_query(page: Page, asking: Asking, kind: str, rng: random.Random) -> str:
    """The query for a page in one of the five ways of writing.

    Raises:
        ValueError: If there is no such way.
    """
    if kind not in WAYS:
        raise ValueError(f"Unknown kind of query: {kind!r}; allowed are {list(WAYS)}.")
    return WAYS[kind](page, asking, rng)


WAYS: Mapping[str, Callable[[Page, Asking, random.Random], str]] = {
    VIETNAMESE: lambda page, asking, rng: asking.ask(page, VIETNAMESE),
    PLAIN: lambda page, asking, rng: strip_diacritics(asking.ask(page, VIETNAMESE)),
    TYPOS: lambda page, asking, rng: add_typing_errors(asking.ask(page, VIETNAMESE), rng),
    ENGLISH: lambda page, asking, rng: asking.ask(page, ENGLISH),
    CHINESE: lambda page, asking, rng: asking.ask(page, CHINESE),
}
"""Way of writing -> what writes a page's query so."""
