"""Vietnamese words and names, written down for this project, from which documents and lines of text are made."""

from __future__ import annotations


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.replace("\n", " ").split(","))


BUSINESS_WORDS = _listed(
    """
    hóa đơn, biên lai, hợp đồng, phụ lục, điều khoản, chữ ký, con dấu, giám đốc, kế toán, thủ quỹ, nhân viên,
    khách hàng, người mua, người bán, bên thuê, đơn vị, địa chỉ, điện thoại, mã số, thuế suất, tiền thuế,
    tiền mặt, chuyển khoản, tài khoản, ngân hàng, chi nhánh, số dư, lãi suất, vay vốn, trả góp, đặt cọc,
    thanh toán, tạm ứng, hoàn tiền, giảm giá, khuyến mãi, giá bán, đơn giá, thành tiền, tổng cộng, số lượng,
    trọng lượng, kích thước, màu sắc, chất liệu, sản phẩm, hàng hóa, kho hàng, nhập kho, xuất kho, tồn kho,
    vận chuyển, giao hàng, nhận hàng, bốc xếp, đóng gói, bảo hành, bảo hiểm, bảo trì, sửa chữa, lắp đặt,
    kiểm tra, nghiệm thu, bàn giao, quyết toán, ngân sách, chi phí, doanh thu, lợi nhuận, cổ phần, cổ đông,
    vốn góp, đầu tư, dự án, kế hoạch, báo cáo, biên bản, quyết định, thông báo, công văn, tờ trình, đề nghị,
    yêu cầu, phê duyệt, ký tên, xác nhận, công chứng, giấy phép, đăng ký, kinh doanh, thương mại, dịch vụ,
    sản xuất, xây dựng, vật liệu, xi măng, sắt thép, gạch ngói, cát đá, gỗ, sơn, kính, nhôm, ống nước,
    dây điện, máy bơm, máy tính, máy in, bàn ghế, tủ sách, giấy, bút, mực, sổ, kẹp, băng keo, điện, nước,
    xăng, dầu, ga, than, gạo, bún, phở, bánh mì, cà phê, trà, sữa, đường, muối, nước mắm, rau, củ, quả,
    thịt bò, thịt gà, cá, tôm, mực khô, trứng, đậu phụ, bưởi, cam, chuối, xoài, dứa, ổi, nhãn, vải thiều,
    sầu riêng, thanh long, hạt điều, hồ tiêu, cao su, dệt may, da giày, thủy sản, nông sản, phân bón, thuốc,
    bệnh viện, trường học, khách sạn, nhà hàng, siêu thị, chợ, cửa hàng, văn phòng, nhà xưởng, căn hộ,
    mặt bằng, đất, ruộng, vườn, đường phố, quận, huyện, xã, phường, thị trấn, tỉnh, thành phố, làng, thôn,
    ngõ, ngách, tầng, phòng, cửa, sân, cổng, cầu, bến xe, nhà ga, sân bay, cảng, tàu, thuyền, xe tải, xe máy,
    ô tô, xe buýt, tắc xi, vé, hành lý, lịch trình, khởi hành, điểm đến, ngày, tháng, năm, giờ, phút, sáng,
    trưa, chiều, tối, hôm nay, ngày mai, tuần, quý, thời hạn, gia hạn, hết hạn, bắt đầu, kết thúc, họ tên,
    tuổi, giới tính, quốc tịch, dân tộc, nghề nghiệp, học vấn, lương, thưởng, phụ cấp, nghỉ phép, tuyển dụng,
    thử việc, đào tạo, thực tập, tốt nghiệp, bằng cấp, kỹ sư, bác sĩ, giáo viên, luật sư, thợ may, thợ điện,
    công nhân, nông dân, gia đình, vợ, chồng, con, ông, bà, cha, mẹ, anh, chị, em, bạn, mới, cũ, lớn, nhỏ,
    dài, ngắn, cao, thấp, rộng, hẹp, nặng, nhẹ, đỏ, xanh, vàng, trắng, đen, nâu, tím, hồng, một, hai, ba,
    bốn, năm mươi, sáu, bảy, tám, chín, mười, trăm, nghìn, triệu, tỷ, đồng, miễn phí, ưu đãi, chất lượng,
    uy tín, an toàn, nhanh, chậm, đúng, đủ, thiếu, thừa
    """
)
"""Common words of business documents, in no particular order."""

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
