"""Vietnamese words and names, written down for this project, from which documents and lines of text are made."""

from __future__ import annotations


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.replace("\n", " ").split(","))


BUSINESS_WORDS = _listed(
    """
    hóa đơn, biên lai, hợp đồng, phụ lục, chữ ký, con dấu, giám đốc, kế toán, thủ quỹ, nhân viên, khách hàng,
    người mua, người bán, đơn vị, địa chỉ, điện thoại, mã số, thuế suất, tiền mặt, tài khoản, ngân hàng,
    chi nhánh, lãi suất, đặt cọc, thanh toán, tạm ứng, giảm giá, đơn giá, thành tiền, tổng cộng, số lượng,
    kích thước, màu sắc, sản phẩm, nhập kho, xuất kho, vận chuyển, giao hàng, bảo hành, sửa chữa, kiểm tra,
    bàn giao, chi phí, doanh thu, lợi nhuận, cổ phần, đầu tư, dự án, báo cáo, giấy phép, đăng ký, dịch vụ,
    xây dựng, văn phòng, cửa hàng, thời hạn, gia hạn, bắt đầu, kết thúc, miễn phí, gỗ, sơn, kính, giấy, bút, mực,
    sổ, điện, nước, xăng, than, gạo, trà, sữa, đường, muối, rau, cá, tôm, cam, chuối, đất, vườn, quận, huyện, xã,
    tỉnh, tầng, phòng, cửa, cầu, cảng, tàu, vé, ngày, tháng, năm, giờ, sáng, chiều, tuần, quý, tuổi, lương,
    thưởng, mới, cũ, lớn, nhỏ, đỏ, xanh, vàng, trắng, đen, hai, ba, sáu, bảy, trăm, nghìn, triệu, đồng
    """
)
"""Words of business documents, a few more than a hundred: a short training sees each of them often."""

SURNAMES = _listed(
    """
    Nguyễn, Trần, Lê, Phạm, Hoàng, Huỳnh, Phan, Vũ, Võ, Đặng, Bùi, Đỗ, Hồ, Ngô, Dương, Lý, Đinh, Trịnh
    """
)
MIDDLE_NAMES = _listed(
    """
    Văn, Thị, Hữu, Đức, Minh, Thanh, Ngọc, Quốc, Thu, Xuân, Hồng, Gia, Bảo, Kim, Phương, Anh
    """
)
GIVEN_NAMES = _listed(
    """
    An, Bình, Châu, Cường, Dung, Dũng, Giang, Hà, Hải, Hạnh, Hiếu, Hoa, Hùng, Huệ, Hương, Khánh, Lan, Liên,
    Linh, Long, Mai, Nam, Nga, Nhung, Oanh, Phúc, Quân, Quỳnh, Sơn, Tâm, Thảo, Thắng, Thúy, Trang, Trung, Tú,
    Tuấn, Uyên, Vân, Việt, Vinh, Yến
    """
)
BRAND_WORDS = _listed(
    """
    Minh, Phát, Hưng, Thịnh, Đại, Lộc, Phú, Quý, Tân, Tiến, Thành, Công, An, Khang, Hòa, Bình, Đông, Á, Việt,
    Nhật, Sao, Mai, Hoàng, Gia, Trường, Thọ, Vạn, Xuân, Ngọc, Thiên, Bảo, Long
    """
)
COMPANY_KINDS = ("Công ty TNHH", "Công ty CP", "Doanh nghiệp", "Hợp tác xã")
SHOP_GOODS = {
    "Siêu thị": ("Gạo tẻ", "Nước mắm", "Sữa chua", "Dầu ăn"),
    "Nhà sách": ("Vở kẻ ngang", "Bút bi", "Giấy in", "Sách giáo khoa"),
    "Quán ăn": ("Phở bò", "Bún chả", "Cơm tấm", "Trà đá"),
    "Tiệm bánh": ("Bánh mì", "Bánh bao", "Bánh kem", "Bánh cuốn"),
    "Nhà thuốc": ("Thuốc ho", "Vitamin C", "Khẩu trang", "Bông băng"),
    "Quán cà phê": ("Cà phê sữa", "Cà phê đen", "Trà đào", "Nước cam"),
    "Tạp hóa": ("Mì gói", "Đường cát", "Muối i-ốt", "Xà phòng"),
}
"""Kind of shop -> what its receipts list."""
